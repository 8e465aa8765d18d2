//! Direct volumes of a pod that runs: how full they are, and their growth.

use std::path::Path;
use std::sync::{Arc, PoisonError};

use agent_api::agent as api;
use agent_api::csi::VolumeStatsResponse;
use serde_json::json;

use super::{Inner, Sandbox, Slot};
use crate::host_work::Progress;
use crate::management::{self, Request};
use crate::storage::block::MountedVolume;
use crate::{Error, direct_volume};

impl Sandbox {
    /// Serves questions about volumes, once there are some. Ends with the sandbox.
    pub(super) async fn serve_volumes(&self) {
        if self.0.serving.get().is_some() || self.volumes().is_empty() {
            return;
        }
        let Some(run) = self.0.host.lock().await.as_ref().map(|host| host.run.path().to_owned()) else { return };
        let listener = match management::listen(&run) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::warn!(%error, "nobody can ask about the pod's volumes");
                return;
            }
        };
        let inner = Arc::downgrade(&self.0);
        let task = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    // for want of a descriptor: nothing tells when one is free
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                };
                let Some(inner) = inner.upgrade() else { break };
                tokio::spawn(management::serve(stream, |request| async move { Self(inner).answer(request).await }));
            }
        });
        if let Err(task) = self.0.serving.set(task) {
            task.abort();
        }
    }

    async fn answer(&self, request: Request) -> Result<String, Error> {
        match request {
            Request::VolumeStats(path) => {
                let volume = self.volume(&path)?;
                let request = api::VolumeStatsRequest { volume_guest_path: volume.point, ..Default::default() };
                let stats = self
                    .0
                    .agent
                    .call("asking for a volume's statistics", |client, context| async {
                        client.get_volume_stats(context, &request).await
                    })
                    .await?;
                Ok(text(&stats))
            }
            Request::VolumeResize(path, size) => self.enlarge(&self.volume(&path)?, size).await.map(|()| String::new()),
        }
    }

    async fn enlarge(&self, volume: &MountedVolume, size: u64) -> Result<(), Error> {
        let vm = self.vm().await?;
        if vm.is_fixed(&volume.disk) {
            return Err(Error::Unsupported(format!(
                "direct volume {} is persistent memory of its pod (block_device_driver = \"virtio-pmem\"), which cannot \
                 grow while the pod runs",
                volume.path.display()
            )));
        }
        let resize = vm.resize().ok_or(hypervisor::Error::Lacks { what: "disks that grow while it runs" })?;
        let (device, limit) = (volume.device.clone(), self.0.env.config.agent.request_timeout);
        let what = format!("block device {}", device.display());
        let grow = move |_: &Progress| direct_volume::grow(&device, size);
        let size = self.0.work.within(limit).run(&what, grow).await?;
        resize.disk(&volume.disk, size).await?;
        let request = api::ResizeVolumeRequest { volume_guest_path: volume.point.clone(), size, ..Default::default() };
        self.0
            .agent
            .call("enlarging a volume", |client, context| async { client.resize_volume(context, &request).await })
            .await
            .map(drop)
    }

    fn volume(&self, path: &Path) -> Result<MountedVolume, Error> {
        let found = self.volumes().into_iter().find(|volume| volume.path == path);
        found.ok_or_else(|| Error::NotFound(format!("direct volume {} in this pod", path.display())))
    }

    fn volumes(&self) -> Vec<MountedVolume> {
        let containers = self.0.containers.lock().unwrap_or_else(PoisonError::into_inner);
        let made = containers.values().filter_map(|slot| match slot {
            Slot::Made(container) => Some(&container.volumes),
            Slot::Making(_) => None,
        });
        made.flatten().cloned().collect()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(task) = self.serving.get() {
            task.abort();
        }
    }
}

/// As Kata's runtime writes it.
fn text(stats: &VolumeStatsResponse) -> String {
    let usage = stats
        .usage
        .iter()
        .map(|one| json!({"available": one.available, "total": one.total, "used": one.used, "unit": one.unit.value()}));
    let condition = json!({"abnormal": stats.volume_condition.abnormal, "message": stats.volume_condition.message});
    json!({"usage": usage.collect::<Vec<_>>(), "volume_condition": condition}).to_string()
}
