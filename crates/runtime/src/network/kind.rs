//! What an interface of the pod is, and thereby how it gets into the VM.

use config::Internetworking;
use rtnetlink::packet_route::link::{InfoData, InfoIpVlan, InfoKind, IpVlanMode, LinkAttribute, LinkInfo, LinkMessage};

/// A kind of Ethernet interface that a VM can have. What is not here cannot be brought in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One end of a pair; the other is the host's.
    Veth,
    /// A MAC address of its own on an interface of the host.
    MacVlan,
    /// The MAC address of an interface of the host, told apart by IP addresses. The frames of the VM carry that MAC, which
    /// is what the kernel expects in mode `l2`. In `l3` nobody answers ARP: the interface says so by its flag `NOARP`, which
    /// the guest's gets as well. In `l3s` what comes in goes to the namespace's IP layer past every hook for frames.
    IpVlan,
    /// A VLAN of an interface that is in the pod's namespace too.
    Vlan,
    /// An end of nothing.
    Dummy,
    /// A tap whose other end is a program's (slirp4netns, a CNI plugin).
    Tap,
    /// A network card, or a virtual function of one, at this PCI address.
    Physical(String),
}

/// How an interface is joined with the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attachment {
    /// A tap, by traffic control.
    TcFilter,
    /// A macvtap on top.
    MacVtap,
    /// The device itself.
    Vfio,
}

impl Kind {
    /// Reads it from the kernel's answer; the error says in words what it is instead.
    pub(super) fn of(message: &LinkMessage) -> Result<Self, String> {
        let (mut kind, mut bus, mut device, mut is_l3s) = (None, None, None, false);
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::LinkInfo(infos) => {
                    kind = infos.iter().find_map(|one| if let LinkInfo::Kind(kind) = one { Some(kind) } else { None });
                    let mode = InfoIpVlan::Mode(IpVlanMode::L3S);
                    is_l3s = infos
                        .iter()
                        .any(|one| matches!(one, LinkInfo::Data(InfoData::IpVlan(all)) if all.contains(&mode)));
                }
                LinkAttribute::ParentDevBusName(name) => bus = Some(name.as_str()),
                LinkAttribute::ParentDevName(name) => device = Some(name),
                _ => {}
            }
        }
        match (kind, bus, device) {
            (Some(InfoKind::Veth), ..) => Ok(Self::Veth),
            (Some(InfoKind::MacVlan), ..) => Ok(Self::MacVlan),
            (Some(InfoKind::IpVlan), ..) if is_l3s => {
                Err("is an ipvlan in mode l3s, whose packets cannot be redirected to a VM: use mode l2 or l3".into())
            }
            (Some(InfoKind::IpVlan), ..) => Ok(Self::IpVlan),
            (Some(InfoKind::Vlan), ..) => Ok(Self::Vlan),
            (Some(InfoKind::Dummy), ..) => Ok(Self::Dummy),
            (Some(InfoKind::Tun), ..) => Ok(Self::Tap),
            (Some(other), ..) => Err(format!(
                "is of kind {other}, which cannot be connected to a VM: use veth, macvlan, ipvlan, vlan, a tap or a PCI device"
            )),
            (None, Some("pci"), Some(device)) => Ok(Self::Physical(device.clone())),
            (None, bus, _) => Err(format!(
                "is a physical interface on {}, not on the PCI bus, so it cannot be passed to a VM: use a macvlan or ipvlan on top of it",
                bus.unwrap_or("an unknown bus")
            )),
        }
    }

    /// One without an address and up is still the pod's, unless it is a tap: that may be anybody's, and ours.
    pub(super) fn may_be_bare(&self) -> bool {
        !matches!(self, Self::Tap)
    }

    /// The configured model is for those that can be below a macvtap: beside a macvlan the kernel would put it, not on
    /// top, and an ipvlan has no MAC address of its own.
    pub(super) fn attachment(&self, model: Internetworking) -> Attachment {
        match self {
            Self::Physical(_) => Attachment::Vfio,
            Self::Veth | Self::Vlan | Self::Dummy | Self::Tap if model == Internetworking::MacVtap => {
                Attachment::MacVtap
            }
            _ => Attachment::TcFilter,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(attributes: Vec<LinkAttribute>) -> Result<Kind, String> {
        let mut message = LinkMessage::default();
        message.attributes = attributes;
        Kind::of(&message)
    }

    fn virtual_one(kind: InfoKind) -> Result<Kind, String> {
        of(vec![LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])])
    }

    fn real(bus: &str, device: &str) -> Result<Kind, String> {
        of(vec![LinkAttribute::ParentDevName(device.into()), LinkAttribute::ParentDevBusName(bus.into())])
    }

    #[test]
    fn each_kind_has_its_way() {
        let model = Internetworking::MacVtap;
        for (kind, attachment) in [
            (virtual_one(InfoKind::Veth), Attachment::MacVtap),
            (virtual_one(InfoKind::Vlan), Attachment::MacVtap),
            (virtual_one(InfoKind::Dummy), Attachment::MacVtap),
            (virtual_one(InfoKind::Tun), Attachment::MacVtap),
            (virtual_one(InfoKind::MacVlan), Attachment::TcFilter),
            (virtual_one(InfoKind::IpVlan), Attachment::TcFilter),
            (real("pci", "0000:3b:02.1"), Attachment::Vfio),
        ] {
            let kind = kind.expect("a kind");
            assert_eq!(kind.attachment(model), attachment, "{kind:?}");
            let other = if attachment == Attachment::Vfio { Attachment::Vfio } else { Attachment::TcFilter };
            assert_eq!(kind.attachment(Internetworking::TcFilter), other, "{kind:?}");
        }
    }

    #[test]
    fn what_cannot_be_says_why() {
        assert!(virtual_one(InfoKind::Bridge).expect_err("refused").contains("bridge"));
        assert!(real("virtio", "virtio2").expect_err("refused").contains("virtio"));
        of(Vec::new()).expect_err("refused");
        let ipvlan = |mode: IpVlanMode| {
            let data = LinkInfo::Data(InfoData::IpVlan(vec![InfoIpVlan::Mode(mode)]));
            of(vec![LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::IpVlan), data])])
        };
        assert_eq!((ipvlan(IpVlanMode::L2), ipvlan(IpVlanMode::L3)), (Ok(Kind::IpVlan), Ok(Kind::IpVlan)));
        assert!(ipvlan(IpVlanMode::L3S).expect_err("refused").contains("l3s"));
    }
}
