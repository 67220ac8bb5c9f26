//! What can go wrong with an answer.

/// A fault of one answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// None, so that the next one comes later.
    Nothing,
    /// This status with these headers, and nothing else.
    Answer(u16, Vec<(&'static str, String)>),
    /// This JSON, and nothing is done.
    Pretend(String),
    /// The connection is closed after so many bytes of the body.
    CutAfter(usize),
    /// One bit of the body is another.
    FlippedBit,
    /// More bytes than announced by the listing.
    TooLong,
    /// The whole file, though a part was asked for.
    NoRanges,
    /// After so many bytes, nothing more comes for seconds.
    SilentAfter(usize),
    /// It comes in four parts with pauses that a client has to bear.
    Slow,
}

impl Fault {
    /// A status with the code by which the Hub tells refusals apart.
    pub(crate) fn status(status: u16, code: &str) -> Self {
        let headers = if code.is_empty() { vec![] } else { vec![("X-Error-Code", code.to_owned())] };
        Self::Answer(status, headers)
    }
}
