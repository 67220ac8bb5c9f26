//! What is written to a Hub.

use super::{
    Shared,
    http::{Answer, Request},
};

pub(super) fn answer(_request: &Request, _shared: &Shared) -> Answer {
    Answer::error(404, "no such address")
}
