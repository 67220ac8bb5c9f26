//! The processes of a run on several machines, which MPI starts: *ranks*. They form a ring; each sends messages to the next rank and
//! receives those of the rank before. Everything that ranks exchange is made of that.

pub mod message;
#[cfg(feature = "mpi")]
mod mpi_link;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use crate::error::{ClusterError, Result};

/// Bytes of a broadcast that travel together: while one piece goes to the next rank, the piece behind it arrives.
const PIECE: usize = 4 << 20;
/// Pieces that the network's speed is measured with.
const MEASURED: usize = 8;

/// A rank's messages to its neighbours in the ring.
pub trait Link: Send + Sync {
    /// Sends a message to the next rank. Returns before it has arrived, also if nothing receives it yet.
    ///
    /// # Errors
    /// When the connection has ended.
    fn send(&self, message: Vec<u8>) -> Result<()>;

    /// Waits for the next message of the rank before.
    ///
    /// # Errors
    /// [`ClusterError::Silent`] when that rank gives no sign of life.
    fn receive(&self) -> Result<Vec<u8>>;

    /// Ends all ranks at once, with this exit code. Returns if that fails.
    fn abort(&self, code: u8);

    /// Ends this rank's part in the run. Returns once every rank has called it.
    fn leave(&self);
}

/// What a rank has exchanged with the others.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Exchanged {
    /// Bytes of all messages to the next rank. MPI adds a few bytes to each.
    pub sent: u64,
    /// How often every rank has waited for all others.
    pub barriers: u64,
    /// Seconds of waiting for messages.
    pub waited: f64,
}

impl Exchanged {
    /// What was exchanged after `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            sent: self.sent - before.sent,
            barriers: self.barriers - before.barriers,
            waited: self.waited - before.waited,
        }
    }
}

/// This process among the ranks of a run. Rank 0 is the *root*: it prints, writes, and has the sums.
pub struct Cluster {
    rank: usize,
    /// The machine of each rank.
    hosts: Vec<String>,
    /// `None` in a run of one process.
    link: Option<Box<dyn Link>>,
    exchanged: Mutex<Exchanged>,
}

impl Cluster {
    /// A run of one process.
    pub fn alone() -> Self {
        Self { rank: 0, hosts: vec!["localhost".into()], link: None, exchanged: Mutex::default() }
    }

    /// Joins the other processes that MPI has started. Called once in a process.
    ///
    /// # Errors
    /// [`ClusterError::WithoutMpi`] when this program was built without the feature `mpi`; when MPI cannot be initialized.
    pub fn join() -> Result<Self> {
        #[cfg(feature = "mpi")]
        return mpi_link::join();
        #[cfg(not(feature = "mpi"))]
        Err(ClusterError::WithoutMpi.into())
    }

    /// Rank `rank`, connected by `link`; the machines of all ranks in their order.
    #[cfg(any(test, feature = "mpi"))]
    fn of(rank: usize, hosts: Vec<String>, link: Box<dyn Link>) -> Self {
        // A ring of one has no neighbours.
        let link = Some(link).filter(|_| hosts.len() > 1);
        Self { rank, hosts, link, exchanged: Mutex::default() }
    }

    /// This process, counted from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of processes.
    pub fn ranks(&self) -> usize {
        self.hosts.len()
    }

    /// Whether this process is rank 0, or the only one.
    pub fn is_root(&self) -> bool {
        self.rank == 0
    }

    /// Whether this process is the last rank, or the only one.
    pub fn is_last(&self) -> bool {
        self.rank + 1 == self.ranks()
    }

    /// A rank for messages: `rank 2 (node-b)`.
    pub fn name(&self, rank: usize) -> String {
        name(rank, &self.hosts[rank])
    }

    /// The name of this rank's machine.
    pub fn host(&self) -> &str {
        &self.hosts[self.rank]
    }

    /// Ranks on the same machine as this one, which is one of them.
    pub fn ranks_here(&self) -> usize {
        self.hosts.iter().filter(|host| *host == self.host()).count()
    }

    /// Bytes a second that every rank sends to the next one while all do so: measured, and the slowest of all. Returned on the root.
    ///
    /// # Errors
    /// Those of [`Cluster::send`] and [`Cluster::receive`].
    pub fn measure_speed(&self) -> Result<Option<f64>> {
        self.barrier()?;
        let begun = Instant::now();
        for _ in 0..MEASURED {
            self.send(vec![0; PIECE])?;
        }
        for _ in 0..MEASURED {
            self.receive()?;
        }
        let speed = (MEASURED * PIECE) as f64 / begun.elapsed().as_secs_f64();
        let all = self.gather(message::of_floats(&[speed]))?;
        let speeds = all.map(|all| all.into_iter().flat_map(|speed| message::floats(&speed)));
        Ok(speeds.map(|speeds| speeds.fold(f64::INFINITY, f64::min)))
    }

    /// Ranks on the same machine before this one.
    pub fn local_rank(&self) -> usize {
        let (before, own) = (&self.hosts[..self.rank], &self.hosts[self.rank]);
        before.iter().filter(|host| *host == own).count()
    }

    /// Sends a message to the next rank; the last rank's go to the root. Returns before it has arrived.
    ///
    /// # Errors
    /// When the connection has ended.
    pub fn send(&self, message: Vec<u8>) -> Result<()> {
        self.count(|exchanged| exchanged.sent += message.len() as u64);
        self.link().send(message)
    }

    /// Waits for the next message of the rank before.
    ///
    /// # Errors
    /// When that rank gives no sign of life.
    pub fn receive(&self) -> Result<Vec<u8>> {
        let begun = Instant::now();
        let message = self.link().receive();
        self.count(|exchanged| exchanged.waited += begun.elapsed().as_secs_f64());
        message
    }

    /// What this rank has exchanged so far.
    pub fn exchanged(&self) -> Exchanged {
        *self.exchanged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a barrier that is made of messages: every rank waits for all others.
    pub fn count_barrier(&self) {
        self.count(|exchanged| exchanged.barriers += 1);
    }

    fn count(&self, add: impl FnOnce(&mut Exchanged)) {
        add(&mut self.exchanged.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn link(&self) -> &dyn Link {
        self.link.as_deref().expect("there are several ranks")
    }

    /// Returns the root's message on every rank. `message` is `Some` on the root and `None` on the other ranks.
    ///
    /// # Errors
    /// Those of [`Cluster::send`] and [`Cluster::receive`].
    pub fn broadcast(&self, message: Option<Vec<u8>>) -> Result<Vec<u8>> {
        if self.link.is_none() {
            return Ok(message.expect("the root has a message"));
        }
        if let Some(message) = message {
            self.send(message::of_numbers(&[message.len() as u64]))?;
            message.chunks(PIECE).try_for_each(|piece| self.send(piece.to_vec()))?;
            return Ok(message);
        }
        let pass_on = |message: &[u8]| if self.is_last() { Ok(()) } else { self.send(message.to_vec()) };
        let length = self.receive()?;
        pass_on(&length)?;
        let length = message::number(&length) as usize;
        let mut message = Vec::with_capacity(length);
        while message.len() < length {
            let piece = self.receive()?;
            pass_on(&piece)?;
            message.extend(piece);
        }
        Ok(message)
    }

    /// Returns the messages of all ranks on the root, in their order, and `None` on the other ranks.
    ///
    /// # Errors
    /// Those of [`Cluster::send`] and [`Cluster::receive`].
    pub fn gather(&self, own: Vec<u8>) -> Result<Option<Vec<Vec<u8>>>> {
        if self.is_root() {
            let others = (1..self.ranks()).map(|_| self.receive());
            return std::iter::once(Ok(own)).chain(others).collect::<Result<_>>().map(Some);
        }
        (1..self.rank).try_for_each(|_| self.send(self.receive()?))?;
        self.send(own)?;
        Ok(None)
    }

    /// Returns the messages of all ranks on every rank, in their order.
    ///
    /// # Errors
    /// Those of [`Cluster::send`] and [`Cluster::receive`].
    pub fn all_gather(&self, own: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        if self.link.is_none() {
            return Ok(vec![own]);
        }
        self.count_barrier();
        self.send(own.clone())?;
        // From the rank before, then from the one before that.
        let mut all = vec![own];
        for place in 1..self.ranks() {
            let message = self.receive()?;
            if place + 1 < self.ranks() {
                self.send(message.clone())?;
            }
            all.push(message);
        }
        // Backwards from this rank, which goes to its place.
        all.reverse();
        all.rotate_left(self.ranks() - 1 - self.rank);
        Ok(all)
    }

    /// Returns once every rank has called it.
    ///
    /// # Errors
    /// Those of [`Cluster::send`] and [`Cluster::receive`].
    pub fn barrier(&self) -> Result<()> {
        self.count_barrier();
        let all = self.gather(Vec::new())?;
        self.broadcast(all.map(|_| Vec::new())).map(drop)
    }

    /// Compares a text of each rank, about some `thing`, with the root's.
    ///
    /// # Errors
    /// [`ClusterError::Differs`] on the root, when a rank has another text; those of [`Cluster::send`] and [`Cluster::receive`].
    pub fn compare(&self, thing: &str, own: &str) -> Result<()> {
        let all = self.gather(own.as_bytes().to_vec())?.unwrap_or_default();
        let mut all = all.iter().enumerate();
        if let Some((rank, other)) = all.find(|(_, other)| *other != own.as_bytes()) {
            let other = String::from_utf8_lossy(other);
            let differences = format!("{thing} ({own} on rank 0, {other} on rank {rank})");
            return Err(ClusterError::Differs { name: self.name(rank), differences }.into());
        }
        Ok(())
    }

    /// Does some work on the root before the other ranks do it.
    ///
    /// # Errors
    /// Those of the work, and of [`Cluster::barrier`].
    pub fn root_first<T, E: From<crate::Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        if self.is_root() {
            let result = work()?;
            self.barrier()?;
            Ok(result)
        } else {
            self.barrier()?;
            work()
        }
    }

    /// Ends all ranks at once, with this exit code. Returns if that fails, or if there are no others.
    pub fn abort(&self, code: u8) {
        if let Some(link) = &self.link {
            link.abort(code);
        }
    }

    /// Disconnects, after a barrier behind which nothing is sent.
    pub fn leave(&self) {
        if let Some(link) = &self.link {
            link.leave();
        }
    }
}

/// A rank for messages: `rank 2 (node-b)`.
fn name(rank: usize, host: &str) -> String {
    format!("rank {rank} ({host})")
}

/// The windows of each rank: whole batches, so that these are the same for any number of ranks.
pub fn windows_of_ranks(count: usize, per_batch: usize, ranks: usize) -> Vec<Range<usize>> {
    let windows =
        |batches: Range<usize>| (batches.start * per_batch).min(count)..(batches.end * per_batch).min(count);
    split(count.div_ceil(per_batch), ranks).into_iter().map(windows).collect()
}

/// Splits `count` things into `parts` ranges of nearly equal length, the longer ones first.
pub fn split(count: usize, parts: usize) -> Vec<Range<usize>> {
    let start = |part: usize| part * (count / parts) + part.min(count % parts);
    (0..parts).map(|part| start(part)..start(part + 1)).collect()
}
