//! A Hub on loopback: what the `hf-hub` crate asks a Hub for, from memory, with every fault that a network and a server
//! can have. Large files are served from an address of their own, as the Hub does, to which no token may go.

mod faults;
mod http;
mod read;
mod store;
mod write;
mod xet;

use std::{
    ffi::OsStr,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

pub(crate) use faults::Fault;
use http::{Answer, Request};
pub(crate) use store::{Repository, Store};
use xet::XetServer;

use crate::helpers::{Lab, Output};

/// The token of one who has access to everything; any other is of one who has none to what is gated or private.
pub(crate) const TOKEN: &str = "hf_TheTokenThatMustNotBeSeen";

/// Runs the program with this server as its Hub.
pub(crate) fn on_hub<S: AsRef<OsStr>>(lab: &Lab, server: &HubServer, token: &str, arguments: &[S]) -> Output {
    lab.run_with(&variables(&server.endpoint(), token), arguments)
}

/// What makes a server the program's Hub.
pub(crate) fn variables<'a>(endpoint: &'a str, token: &'a str) -> [(&'a str, &'a str); 3] {
    [("HF_ENDPOINT", endpoint), ("HF_HUB_OFFLINE", "0"), ("HF_TOKEN", token)]
}

/// A request that was answered.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) range: Option<String>,
    pub(crate) token: bool,
    /// Whether it went to the address of large files.
    pub(crate) large: bool,
}

/// A running server. It ends with this.
pub(crate) struct HubServer {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    api: SocketAddr,
    large: SocketAddr,
    store: Mutex<Store>,
    faults: Mutex<Vec<(String, Fault, usize)>>,
    seen: Mutex<Vec<Seen>>,
    /// The server for large uploads, if there is one.
    xet: Mutex<Option<XetServer>>,
    stop: AtomicBool,
}

impl HubServer {
    pub(crate) fn start() -> Self {
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [api, large] = [0, 1].map(|at| listeners[at].local_addr().unwrap());
        let shared = Arc::new(Shared {
            api,
            large,
            store: Mutex::default(),
            faults: Mutex::default(),
            seen: Mutex::default(),
            xet: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        for (at, listener) in listeners.into_iter().enumerate() {
            let shared = shared.clone();
            thread::spawn(move || listen(&listener, &shared, at == 1));
        }
        Self { shared }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.shared.api)
    }

    pub(crate) fn store(&self) -> MutexGuard<'_, Store> {
        lock(&self.shared.store)
    }

    /// The next `times` requests whose method and path (`GET /api/…`) contain `part` have this fault.
    pub(crate) fn fault(&self, part: &str, fault: Fault, times: usize) {
        lock(&self.shared.faults).push((part.into(), fault, times));
    }

    pub(crate) fn clear_faults(&self) {
        lock(&self.shared.faults).clear();
    }

    /// What was asked since the last time.
    pub(crate) fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut *lock(&self.shared.seen))
    }

    /// From now on, large files are taken.
    pub(crate) fn with_xet(self) -> Self {
        *lock(&self.shared.xet) = Some(XetServer::start());
        self
    }
}

impl Drop for HubServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for address in [self.shared.api, self.shared.large] {
            // Wakes the listener.
            let _ = TcpStream::connect(address);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn listen(listener: &TcpListener, shared: &Arc<Shared>, large: bool) {
    for stream in listener.incoming() {
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        let (Ok(stream), shared) = (stream, shared.clone()) else { continue };
        thread::spawn(move || serve(&stream, &shared, large));
    }
}

/// Answers the one request of a connection.
fn serve(stream: &TcpStream, shared: &Shared, large: bool) {
    let Some(request) = http::read(stream) else { return };
    lock(&shared.seen).push(Seen {
        method: request.method.clone(),
        path: request.path.clone(),
        range: request.header("range").map(str::to_owned),
        token: request.header("authorization").is_some(),
        large,
    });
    let fault = take_fault(shared, &format!("{} {}", request.method, request.path));
    let answer = match &fault {
        Some(Fault::Answer(status, headers)) => {
            headers.iter().fold(Answer::error(*status, "a fault was asked for"), |answer, (name, value)| {
                answer.with(name, value)
            })
        }
        Some(Fault::Pretend(text)) => Answer::new(200, text.clone().into_bytes()),
        _ if large => read::content(&request, shared, fault == Some(Fault::NoRanges)),
        _ => answer(&request, shared),
    };
    http::write(stream, &request, answer, fault.as_ref());
}

fn answer(request: &Request, shared: &Shared) -> Answer {
    match request.method.as_str() {
        "GET" | "HEAD" => read::answer(request, shared),
        "POST" => write::answer(request, shared),
        _ => Answer::error(405, "method not allowed"),
    }
}

fn take_fault(shared: &Shared, what: &str) -> Option<Fault> {
    let mut faults = lock(&shared.faults);
    let found = faults.iter_mut().find(|(part, _, times)| *times > 0 && what.contains(part.as_str()))?;
    found.2 -= 1;
    Some(found.1.clone())
}
