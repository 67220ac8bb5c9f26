//! The ring over MPI. A thread of its own makes all calls of MPI, so that ranks compute while messages are on their way, and waiting
//! takes no processor time.

use std::{
    collections::VecDeque,
    ffi::c_int,
    mem::MaybeUninit,
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use mpi::{
    Threading,
    ffi::{
        MPI_Cancel, MPI_Irecv, MPI_Isend, MPI_Request, MPI_Test, MPI_Wait, RSMPI_COMM_WORLD,
        RSMPI_STATUS_IGNORE, RSMPI_UINT8_T,
    },
    topology::SimpleCommunicator,
    traits::{Communicator, CommunicatorCollectives},
};

use super::{
    Cluster, Link,
    message::{self, NUMBER},
    name,
};
use crate::error::{ClusterError, Result};

/// A rank that is silent for so long is lost: its machine, its network or the process itself.
const SILENCE: Duration = Duration::from_secs(60);
/// Time between two signs of life.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long the thread waits before it looks for messages again.
const PAUSE: Duration = Duration::from_micros(100);
/// Bytes of a message that MPI gets at once. MPI counts in 32 bits.
const PIECE: usize = 4 << 20;
/// Pieces that MPI sends at the same time.
const IN_FLIGHT: usize = 4;
/// Bytes that each rank introduces itself with: the version of the program and the name of the machine.
const INTRODUCTION: usize = 128;

/// MPI's tags: the length of a message, its pieces, signs of life.
const LENGTH: c_int = 1;
const CONTENT: c_int = 2;
const ALIVE: c_int = 3;

/// In a sign of life, instead of the number of a rank that is lost.
const NONE_LOST: u64 = u64::MAX;

/// What the thread is asked to do.
enum Command {
    Send(Vec<u8>),
    Abort(u8),
    Leave,
}

/// The other end of the thread.
struct MpiLink {
    commands: Mutex<Sender<Command>>,
    received: Mutex<Receiver<Result<Vec<u8>>>>,
    /// Disconnected once the thread has ended.
    ended: Mutex<Receiver<()>>,
}

/// Joins the ring.
pub(super) fn join() -> Result<Cluster> {
    let (commands, to_do) = channel();
    let (messages, received) = channel();
    let (started, start) = channel();
    let (at_the_end, end) = channel();
    thread::Builder::new()
        .name("mpi".into())
        .spawn(move || {
            let _at_the_end: Sender<()> = at_the_end;
            run(&to_do, &messages, &started);
        })
        .map_err(|source| ClusterError::Start { problem: source.to_string() })?;
    let (rank, hosts) = start.recv().map_err(ended)??;
    let link =
        MpiLink { commands: Mutex::new(commands), received: Mutex::new(received), ended: Mutex::new(end) };
    Ok(Cluster::of(rank, hosts, Box::new(link)))
}

/// The error where the other end of a channel is gone.
fn ended<E>(_disconnected: E) -> ClusterError {
    ClusterError::Start { problem: "its thread has ended".into() }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MpiLink {
    fn command(&self, command: Command) -> Result<()> {
        Ok(lock(&self.commands).send(command).map_err(ended)?)
    }
}

impl Link for MpiLink {
    fn send(&self, message: Vec<u8>) -> Result<()> {
        self.command(Command::Send(message))
    }

    fn receive(&self) -> Result<Vec<u8>> {
        lock(&self.received).recv().map_err(ended)?
    }

    fn abort(&self, code: u8) {
        if self.command(Command::Abort(code)).is_ok() {
            let _ = lock(&self.ended).recv_timeout(Duration::from_secs(5));
        }
    }

    fn leave(&self) {
        if self.command(Command::Leave).is_ok() {
            let _ = lock(&self.ended).recv();
        }
    }
}

/// The thread: initializes MPI, moves messages until the rank leaves, and finalizes.
fn run(
    commands: &Receiver<Command>,
    received: &Sender<Result<Vec<u8>>>,
    started: &Sender<Result<(usize, Vec<String>)>>,
) {
    let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else {
        let _ = started.send(Err(ClusterError::Start { problem: "it runs already".into() }.into()));
        return;
    };
    let world = universe.world();
    let hosts = introduce(&world);
    let ranks = world.size() as usize;
    let is_alone = ranks == 1;
    let names = hosts.as_ref().map_or(Vec::new(), Clone::clone);
    if started.send(hosts.map(|hosts| (world.rank() as usize, hosts))).is_err() || is_alone {
        return;
    }
    let rank = world.rank();
    let before = (rank + world.size() - 1) % world.size();
    let mut outgoing = Outgoing::new((rank + 1) % world.size());
    let mut incoming = Incoming::new(before);
    let (mut beat, mut leaves, mut wait) = (Instant::now(), false, Duration::ZERO);
    // A rank that some rank has not heard of. Signs of life carry its number around the ring.
    let mut lost = None;
    // Every rank has received everything before it leaves, but may not have sent its last message.
    while !(leaves && outgoing.is_empty()) {
        match commands.recv_timeout(wait) {
            Ok(Command::Send(message)) => outgoing.add(message),
            Ok(Command::Abort(code)) => world.abort(code.into()),
            Ok(Command::Leave) | Err(RecvTimeoutError::Disconnected) => leaves = true,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if leaves && lost.is_some() {
            // What is left to send may never arrive.
            world.abort(1);
        }
        if beat.elapsed() >= HEARTBEAT {
            outgoing.heartbeat(lost);
            beat = Instant::now();
        }
        let sent = outgoing.move_on();
        let got = incoming.move_on(|message| received.send(Ok(message)).is_ok());
        wait = if sent || got { Duration::ZERO } else { PAUSE };
        if lost.is_none() {
            let silent = incoming.heard.elapsed() > SILENCE;
            lost = if silent { Some(before as usize) } else { incoming.lost };
            if let Some(rank) = lost {
                outgoing.heartbeat(lost);
                let name = name(rank, names.get(rank).map_or("", String::as_str));
                let error = ClusterError::Silent { name, seconds: SILENCE.as_secs() };
                let _ = received.send(Err(error.into()));
            }
        }
    }
    incoming.cancel();
}

/// Exchanges versions and the names of machines. All ranks call it.
fn introduce(world: &SimpleCommunicator) -> Result<Vec<String>> {
    let host = mpi::environment::processor_name().unwrap_or_else(|_| "unknown".into());
    let version = env!("CARGO_PKG_VERSION");
    let mut own = format!("{version} {host}").into_bytes();
    own.resize(INTRODUCTION, 0);
    let mut all = vec![0u8; INTRODUCTION * world.size() as usize];
    world.all_gather_into(&own[..], &mut all[..]);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    let mut hosts = Vec::new();
    for (rank, bytes) in all.chunks(INTRODUCTION).enumerate() {
        let introduction = text(bytes);
        let (found, host) = introduction.split_once(' ').unwrap_or((&introduction, ""));
        if found != version {
            let differences = format!("version ({version} on rank {}, {found} on rank {rank})", world.rank());
            return Err(ClusterError::Differs { name: name(rank, host), differences }.into());
        }
        hosts.push(host.to_owned());
    }
    Ok(hosts)
}

/// A call of MPI that has begun, and the memory that it reads or writes.
struct Transfer {
    request: MPI_Request,
    buffer: Vec<u8>,
    ended: bool,
}

impl Transfer {
    fn send(to: c_int, tag: c_int, buffer: Vec<u8>) -> Self {
        let mut request = MaybeUninit::uninit();
        // SAFETY: the buffer's heap memory is neither moved nor changed before the request has ended: it is dropped or given out only
        // by `ended`. MPI is initialized, and only this thread calls it.
        unsafe {
            MPI_Isend(
                buffer.as_ptr().cast(),
                buffer.len() as c_int,
                RSMPI_UINT8_T,
                to,
                tag,
                RSMPI_COMM_WORLD,
                request.as_mut_ptr(),
            );
            Self { request: request.assume_init(), buffer, ended: false }
        }
    }

    fn receive(from: c_int, tag: c_int, length: usize) -> Self {
        let mut buffer = vec![0; length];
        let mut request = MaybeUninit::uninit();
        // SAFETY: as in `send`; the buffer is not read before the request has ended.
        unsafe {
            MPI_Irecv(
                buffer.as_mut_ptr().cast(),
                length as c_int,
                RSMPI_UINT8_T,
                from,
                tag,
                RSMPI_COMM_WORLD,
                request.as_mut_ptr(),
            );
            Self { request: request.assume_init(), buffer, ended: false }
        }
    }

    /// Whether MPI has no more use for the buffer.
    fn ended(&mut self) -> bool {
        let mut flag = c_int::from(self.ended);
        if !self.ended {
            // SAFETY: the request was begun by this thread and has not ended.
            unsafe {
                MPI_Test(&mut self.request, &mut flag, RSMPI_STATUS_IGNORE);
            }
        }
        self.ended = flag != 0;
        self.ended
    }

    /// Withdraws a receive that nothing was sent for.
    fn cancel(mut self) {
        if !self.ended {
            // SAFETY: the request was begun by this thread and has not ended.
            unsafe {
                MPI_Cancel(&mut self.request);
                MPI_Wait(&mut self.request, RSMPI_STATUS_IGNORE);
            }
        }
    }
}

/// Messages to the next rank.
struct Outgoing {
    to: c_int,
    waiting: VecDeque<(c_int, Vec<u8>)>,
    in_flight: VecDeque<Transfer>,
    alive: Option<Transfer>,
}

impl Outgoing {
    fn new(to: c_int) -> Self {
        Self { to, waiting: VecDeque::new(), in_flight: VecDeque::new(), alive: None }
    }

    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.in_flight.is_empty()
    }

    fn add(&mut self, message: Vec<u8>) {
        self.waiting.push_back((LENGTH, message::of_numbers(&[message.len() as u64])));
        if message.len() <= PIECE {
            self.waiting.push_back((CONTENT, message));
        } else {
            self.waiting.extend(message.chunks(PIECE).map(|piece| (CONTENT, piece.to_vec())));
        }
    }

    /// A sign of life, unless the last one is on its way still. It has the number of the rank that is lost, if one is.
    fn heartbeat(&mut self, lost: Option<usize>) {
        if self.alive.as_mut().is_none_or(Transfer::ended) {
            let content = lost.map_or(NONE_LOST, |rank| rank as u64);
            self.alive = Some(Transfer::send(self.to, ALIVE, message::of_numbers(&[content])));
        }
    }

    /// Gives MPI more to send where it has sent something. Returns whether anything has changed.
    fn move_on(&mut self) -> bool {
        let before = self.in_flight.len();
        self.in_flight.retain_mut(|transfer| !transfer.ended());
        let mut changed = self.in_flight.len() < before;
        while self.in_flight.len() < IN_FLIGHT
            && let Some((tag, bytes)) = self.waiting.pop_front()
        {
            self.in_flight.push_back(Transfer::send(self.to, tag, bytes));
            changed = true;
        }
        changed
    }
}

/// Messages of the rank before.
struct Incoming {
    from: c_int,
    length: Transfer,
    alive: Transfer,
    /// The message that arrives, its whole length, and its next piece.
    message: Option<(Vec<u8>, usize, Transfer)>,
    /// When something arrived last.
    heard: Instant,
    /// The rank that is lost, as the rank before says.
    lost: Option<usize>,
}

impl Incoming {
    fn new(from: c_int) -> Self {
        Self {
            from,
            length: Transfer::receive(from, LENGTH, NUMBER),
            alive: Transfer::receive(from, ALIVE, NUMBER),
            message: None,
            heard: Instant::now(),
            lost: None,
        }
    }

    /// Gives complete messages to `deliver`. Returns whether anything has arrived.
    fn move_on(&mut self, deliver: impl Fn(Vec<u8>) -> bool) -> bool {
        let mut changed = false;
        if self.alive.ended() {
            let content = message::number(&self.alive.buffer);
            self.lost = (content != NONE_LOST).then_some(content as usize);
            self.alive = Transfer::receive(self.from, ALIVE, NUMBER);
            self.heard = Instant::now();
        }
        if self.message.is_none() && self.length.ended() {
            let whole = message::number(&self.length.buffer) as usize;
            self.message = Some((Vec::new(), whole, self.piece(whole)));
            changed = true;
        }
        if let Some((mut message, whole, mut piece)) = self.message.take() {
            if piece.ended() {
                changed = true;
                // Most messages are one piece.
                let arrived = std::mem::take(&mut piece.buffer);
                if message.is_empty() {
                    message = arrived;
                    message.reserve_exact(whole - message.len());
                } else {
                    message.extend(arrived);
                }
                if message.len() < whole {
                    let next = self.piece(whole - message.len());
                    self.message = Some((message, whole, next));
                } else {
                    self.length = Transfer::receive(self.from, LENGTH, NUMBER);
                    deliver(message);
                }
            } else {
                self.message = Some((message, whole, piece));
            }
        }
        if changed {
            self.heard = Instant::now();
        }
        changed
    }

    /// The next piece of a message of which so much has not arrived.
    fn piece(&self, rest: usize) -> Transfer {
        Transfer::receive(self.from, CONTENT, rest.min(PIECE))
    }

    fn cancel(self) {
        self.length.cancel();
        self.alive.cancel();
    }
}
