//! What is different in the namespace from what the VM has. Pure.

use super::scan::{Link, Neighbour};

/// By places in the list of what the VM has, and by what there is.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Diff {
    /// Not there any more; in falling order, so that each can be removed by its place.
    pub(super) gone: Vec<usize>,
    /// Other addresses, name, MTU or flags.
    pub(super) changed: Vec<(usize, Link)>,
    pub(super) new: Vec<Link>,
}

/// `had` is `None` for a link that cannot be looked for.
pub(super) fn links<'a>(had: impl Iterator<Item = Option<&'a Link>>, there: &[Link]) -> Diff {
    let had: Vec<_> = had.collect();
    let mut diff = Diff::default();
    for (place, old) in had.iter().enumerate().rev() {
        let Some(old) = old else { continue };
        match there.iter().find(|link| is_same(link, old)) {
            None => diff.gone.push(place),
            Some(link) if is_told_otherwise(link, old) => diff.changed.push((place, link.clone())),
            Some(_) => {}
        }
    }
    let is_had = |link: &Link| had.iter().flatten().any(|old| is_same(link, old));
    diff.new.extend(there.iter().filter(|link| !link.idle && !is_had(link)).cloned());
    diff
}

/// The same card of the VM can stand for it. An index is not used again while a namespace lives.
fn is_same(one: &Link, other: &Link) -> bool {
    one.index == other.index && one.mac == other.mac && one.kind == other.kind
}

fn is_told_otherwise(new: &Link, old: &Link) -> bool {
    (&new.name, new.mtu, new.no_arp, &new.addresses) != (&old.name, old.mtu, old.no_arp, &old.addresses)
}

/// Those of `had` for which there is no other now.
pub(super) fn gone(had: &[Neighbour], there: &[Neighbour]) -> Vec<Neighbour> {
    let replaced = |old: &&Neighbour| there.iter().any(|new| new.device == old.device && new.address == old.address);
    had.iter().filter(|old| !replaced(old)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::super::kind::Kind;
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.into(),
            kind: Kind::Veth,
            mac: [2, 0, 0, 0, 0, index as u8],
            mtu: 1500,
            no_arp: false,
            idle: false,
            below: None,
            addresses: vec![(format!("10.0.0.{index}").parse().expect("an address"), 24)],
        }
    }

    #[test]
    fn nothing_is_nothing() {
        let all = [link(2, "a"), link(3, "b")];
        assert_eq!(links(all.iter().map(Some), &all), Diff::default());
    }

    #[test]
    fn what_came_and_went_and_changed() {
        let had = [link(2, "a"), link(3, "b"), link(4, "c")];
        let renamed = Link { name: "z".into(), ..link(3, "b") };
        // a new one with an old name
        let again = Link { index: 9, ..link(2, "a") };
        let there = [renamed.clone(), again.clone()];
        let diff = links(had.iter().map(Some), &there);
        assert_eq!(diff, Diff { gone: vec![2, 0], changed: vec![(1, renamed)], new: vec![again] });
    }

    #[test]
    fn another_mac_address_is_another_card() {
        let new = Link { mac: [2; 6], ..link(2, "a") };
        let diff = links([link(2, "a")].iter().map(Some), std::slice::from_ref(&new));
        assert_eq!(diff, Diff { gone: vec![0], changed: Vec::new(), new: vec![new] });
    }

    #[test]
    fn an_idle_one_keeps_its_place_and_gets_none() {
        let idle = Link { idle: true, addresses: Vec::new(), ..link(2, "a") };
        assert_eq!(links(std::iter::empty(), std::slice::from_ref(&idle)), Diff::default());
        let diff = links([link(2, "a")].iter().map(Some), std::slice::from_ref(&idle));
        assert_eq!(diff, Diff { changed: vec![(0, idle)], ..Diff::default() });
    }

    #[test]
    fn what_is_not_looked_for_is_not_missed() {
        assert_eq!(links([None].into_iter(), &[]), Diff::default());
    }

    #[test]
    fn a_replaced_neighbour_is_not_gone() {
        let neighbour = |address: &str, mac| Neighbour {
            device: "a".into(),
            address: address.parse().expect("an address"),
            mac: [mac; 6],
        };
        let had = [neighbour("10.0.0.1", 1), neighbour("10.0.0.2", 1)];
        assert_eq!(gone(&had, &[neighbour("10.0.0.1", 7)]), [had[1].clone()]);
    }
}
