//! A guest that QEMU stops by itself, because its processor met what KVM cannot do, goes on nowhere, and nobody would hear of
//! it: such a VM is ended.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::qmp::Qmp;
use crate::helper::{Helper, SHORTER};

/// Looks whenever the guest is stopped, for as long as both live.
pub(super) fn watch(qmp: &Arc<Qmp>, process: &Arc<Helper>) {
    let mut stops = qmp.stops();
    let (qmp, process) = (Arc::downgrade(qmp), Arc::downgrade(process));
    tokio::spawn(async move {
        while stops.changed().await.is_ok() {
            let (Some(qmp), Some(process)) = (qmp.upgrade(), process.upgrade()) else { return };
            let Ok(answer) = qmp.execute("query-status", json!({})).await else { return };
            if answer["status"] == "internal-error" {
                let why = format!("for \"Bad address\": {SHORTER}");
                tracing::error!(why, "QEMU stopped the guest, and its last messages say why: killing QEMU");
                process.stop(Duration::ZERO).await;
                return;
            }
        }
    });
}
