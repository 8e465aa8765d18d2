//! The harness itself, on a host that others use too.

use anyhow::{Result, ensure};
use e2e::{neighbour::Neighbour, pod_network::ip, with_node};

#[test]
fn what_others_run_is_not_left_by_us() -> Result<()> {
    let mut neighbour = None;
    // the look at what is left comes after the closure, with the neighbour's pod still there
    with_node(|node| {
        neighbour = Some(Neighbour::start(node)?);
        Ok(())
    })?;
    ensure!(neighbour.is_some());
    drop(neighbour);
    // and what is ours is still found
    let told = with_node(|_| ip("link add keleft type bridge").map(drop));
    ip("link del keleft")?;
    ensure!(told.is_err_and(|error| format!("{error:#}").contains("link keleft")), "nothing was found");
    Ok(())
}
