//! The first moment of a guest that goes on where a saved one stopped.

use std::fs;

use agent_api::protobuf::well_known_types::empty::Empty;
use agent_api::ttrpc;
use agent_api::ttrpc::r#async::TtrpcContext;
use agent_api::wake::UpRequest;
use agent_api::wake_ttrpc::Wake;
use async_trait::async_trait;

use crate::error::Error;
use crate::guest;

/// Less would leave it guessable, bytes; more than the other makes nothing better.
const RANDOM: std::ops::RangeInclusive<usize> = 32..=4096;

pub(crate) struct Waking;

#[async_trait]
impl Wake for Waking {
    async fn up(&self, _: &TtrpcContext, request: UpRequest) -> ttrpc::Result<Empty> {
        let count = request.random.len();
        if !RANDOM.contains(&count) {
            return Err(Error::Invalid(format!("{count} random bytes: must be 32 to 4096")).into());
        }
        // before all else: every clone has the same numbers until then
        guest::reseed(&request.random).map_err(Error::failed("new random numbers"))?;
        guest::set_clock(request.sec, request.usec).map_err(Error::failed("setting the clock"))?;
        // returns when the drivers have them
        fs::write("/sys/bus/pci/rescan", "1").map_err(Error::failed("looking for devices"))?;
        Ok(Empty::new())
    }
}
