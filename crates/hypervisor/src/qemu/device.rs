//! Devices in QEMU's words, the same for its command line and for its monitor. Pure.

use serde_json::{Map, Value, json};

use super::pci::{BUS, Slot};

/// A list of options: `driver=value,…` or a JSON object.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Options(pub(super) Vec<(&'static str, Value)>);

impl Options {
    /// For `-device` and `-netdev`: the first value stands alone.
    pub(super) fn line(&self) -> String {
        let parts = self.0.iter().enumerate().map(|(place, (name, value))| {
            let value = match value {
                Value::Bool(on) => if *on { "on" } else { "off" }.to_owned(),
                Value::String(text) => escape(text),
                other => other.to_string(),
            };
            if place == 0 { value } else { format!("{name}={value}") }
        });
        parts.collect::<Vec<_>>().join(",")
    }

    /// For `device_add` and `netdev_add`.
    pub(super) fn object(self) -> Value {
        Value::Object(self.0.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>())
    }
}

/// In QEMU's option lists a comma is written twice.
pub(super) fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// The host's side of a network card. `queues` and `vhost` are descriptors: numbers that were inherited, or names.
pub(super) fn tap(id: &str, queues: &[String], vhost: &[String]) -> Options {
    let mut options = vec![("type", json!("tap")), ("id", json!(tap_name(id)))];
    // one by its own name, several as a list
    let mut list = |one: &'static str, several: &'static str, from: &[String]| match from {
        [] => {}
        [only] => options.push((one, json!(only))),
        all => options.push((several, json!(all.join(":")))),
    };
    list("fd", "fds", queues);
    list("vhostfd", "vhostfds", vhost);
    if !vhost.is_empty() {
        options.push(("vhost", json!(true)));
    }
    Options(options)
}

/// Its name for `netdev_del`.
pub(super) fn tap_name(id: &str) -> String {
    format!("{id}-host")
}

/// The guest's side of it.
pub(super) fn card(id: &str, mac: &str, queues: usize, place: Option<Slot>) -> Options {
    let mut options = vec![
        ("driver", json!("virtio-net-pci")),
        ("id", json!(id)),
        ("netdev", json!(tap_name(id))),
        ("mac", json!(mac)),
        // no boot from the network, so no ROM
        ("romfile", json!("")),
    ];
    if queues > 1 {
        options.push(("mq", json!(true)));
        // two vectors a pair of queues, one for control, one for configuration
        options.push(("vectors", json!(2 * queues + 2)));
    }
    at(&mut options, place);
    Options(options)
}

/// A folder that a helper serves; `index` is its number in the VM.
pub(super) fn folder(index: usize, tag: &str, queue_size: u32, place: Option<Slot>) -> Options {
    let mut options = vec![
        ("driver", json!("vhost-user-fs-pci")),
        ("id", json!(folder_name(index))),
        ("chardev", json!(format!("fs{index}"))),
        ("tag", json!(tag)),
        ("queue-size", json!(queue_size)),
    ];
    at(&mut options, place);
    Options(options)
}

/// A folder that QEMU serves.
pub(super) fn packets(index: usize, tag: &str) -> Options {
    Options(vec![
        ("driver", json!("virtio-9p-pci")),
        ("id", json!(folder_name(index))),
        ("fsdev", json!(format!("fs{index}"))),
        ("mount_tag", json!(tag)),
    ])
}

/// Its id.
pub(super) fn folder_name(index: usize) -> String {
    format!("folder{index}")
}

/// Where on the bridge.
pub(super) fn at(options: &mut Vec<(&'static str, Value)>, place: Option<Slot>) {
    if let Some(place) = place {
        options.push(("bus", json!(BUS)));
        options.push(("addr", json!(place.address())));
    }
}

/// A PCI device of the host.
pub(super) fn host(id: &str, address: &str, place: Option<Slot>) -> Options {
    let mut options = vec![("driver", json!("vfio-pci")), ("id", json!(id)), ("host", json!(address))];
    at(&mut options, place);
    Options(options)
}

#[cfg(test)]
mod tests {
    use super::super::pci::Bridge;
    use super::*;

    fn names(all: &[&str]) -> Vec<String> {
        all.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn one_queue() {
        assert_eq!(tap("net1", &names(&["7"]), &[]).line(), "tap,id=net1-host,fd=7");
        let place = Bridge::new().take("net1");
        let card = card("net1", "02:00:00:00:00:01", 1, place);
        assert_eq!(
            card.line(),
            "virtio-net-pci,id=net1,netdev=net1-host,mac=02:00:00:00:00:01,romfile=,bus=plug,addr=0x1"
        );
        assert_eq!(card.object()["addr"], "0x1");
    }

    #[test]
    fn several_queues_with_vhost() {
        let tap = tap("n", &names(&["a", "b"]), &names(&["c", "d"]));
        assert_eq!(tap.line(), "tap,id=n-host,fds=a:b,vhostfds=c:d,vhost=on");
        assert_eq!(
            tap.object(),
            json!({"type": "tap", "id": "n-host", "fds": "a:b", "vhostfds": "c:d", "vhost": true})
        );
        let card = card("n", "m", 2, None);
        assert_eq!(card.line(), "virtio-net-pci,id=n,netdev=n-host,mac=m,romfile=,mq=on,vectors=6");
        assert_eq!((card.clone().object()["mq"].clone(), card.object()["vectors"].clone()), (json!(true), json!(6)));
    }

    #[test]
    fn a_comma_does_not_end_a_value() {
        assert_eq!(host("v", "0000:00:01.0,x=y", None).line(), "vfio-pci,id=v,host=0000:00:01.0,,x=y");
    }
}
