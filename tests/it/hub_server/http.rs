//! As much of HTTP/1.1 as is needed: one request a connection.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    thread,
    time::Duration,
};

use serde_json::{Value, json};

use super::Fault;

/// Longer than any client of a test waits.
const SILENCE: Duration = Duration::from_secs(4);

/// Shorter than that.
const PAUSE: Duration = Duration::from_millis(150);

pub(super) struct Request {
    pub(super) method: String,
    /// Without what follows a `?`.
    pub(super) path: String,
    pub(super) query: String,
    headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(header, _)| header == name)?;
        Some(&found.1)
    }

    /// The parts of the path, decoded.
    pub(super) fn parts(&self) -> Vec<String> {
        self.path.split('/').skip(1).map(decoded).collect()
    }

    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

pub(super) struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Answer {
    pub(super) fn new(status: u16, body: Vec<u8>) -> Self {
        Self { status, headers: Vec::new(), body }
    }

    pub(super) fn json(value: &Value) -> Self {
        Self::new(200, value.to_string().into_bytes()).with("Content-Type", "application/json")
    }

    pub(super) fn error(status: u16, message: &str) -> Self {
        let body = json!({ "error": message }).to_string().into_bytes();
        Self::new(status, body).with("X-Error-Message", message)
    }

    pub(super) fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }
}

pub(super) fn read(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        Some(line.trim_end().to_owned())
    };
    let first = line()?;
    let mut words = first.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = Vec::new();
    while let Some((name, value)) = line()?.split_once(':') {
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let (path, query) = (path.to_owned(), query.to_owned());
    let mut request = Request { method, path, query, headers, body: Vec::new() };
    let length = request.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    request.body = vec![0; length];
    reader.read_exact(&mut request.body).ok()?;
    Some(request)
}

/// Sends an answer with its fault. Failures are the client's affair: it may have gone.
pub(super) fn write(mut stream: &TcpStream, request: &Request, answer: Answer, fault: Option<&Fault>) {
    let mut body = answer.body;
    let mut length = body.len();
    match fault {
        Some(Fault::FlippedBit) if !body.is_empty() => {
            let middle = body.len() / 2;
            body[middle] ^= 1;
        }
        Some(Fault::TooLong) => {
            body.extend(b"and more");
            length = body.len();
        }
        _ => {}
    }
    let mut head =
        format!("HTTP/1.1 {} -\r\nConnection: close\r\nContent-Length: {length}\r\n", answer.status);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let _ = stream.write_all((head + "\r\n").as_bytes());
    if request.method == "HEAD" {
        return;
    }
    let now = match fault {
        Some(Fault::CutAfter(bytes) | Fault::SilentAfter(bytes)) => &body[..body.len().min(*bytes)],
        _ => &body[..],
    };
    let parts = if fault == Some(&Fault::Slow) { 4 } else { 1 };
    for part in now.chunks(now.len().div_ceil(parts).max(1)) {
        if parts > 1 {
            thread::sleep(PAUSE);
        }
        let _ = stream.write_all(part).and_then(|()| stream.flush());
    }
    if let Some(Fault::SilentAfter(_)) = fault {
        thread::sleep(SILENCE);
    }
}

fn decoded(part: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = part.as_bytes();
    while let [first, others @ ..] = rest {
        let hex = others.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match (first, hex.and_then(|hex| u8::from_str_radix(hex, 16).ok())) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &others[2..];
            }
            _ => {
                bytes.push(*first);
                rest = others;
            }
        }
    }
    String::from_utf8(bytes).unwrap_or_default()
}
