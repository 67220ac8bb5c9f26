//! The processes of a run on several machines, which MPI starts: *ranks*. They form a ring; each sends messages to the next rank and
//! receives those of the rank before. Everything that ranks exchange is made of that.

#[cfg(feature = "mpi")]
mod mpi_link;
#[cfg(test)]
pub(crate) mod tests;

use std::time::Instant;

#[cfg(not(feature = "mpi"))]
use crate::error::ClusterError;
use crate::error::Result;

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

/// This process among the ranks of a run. Rank 0 is the *root*: it prints, writes, and has the sums.
pub struct Cluster {
    rank: usize,
    /// The machine of each rank.
    hosts: Vec<String>,
    /// `None` in a run of one process.
    link: Option<Box<dyn Link>>,
}

impl Cluster {
    /// A run of one process.
    pub fn alone() -> Self {
        Self { rank: 0, hosts: vec!["localhost".into()], link: None }
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
        Self { rank, hosts, link }
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
        let all = self.gather(speed.to_le_bytes().to_vec())?;
        let speeds =
            all.map(|all| all.into_iter().map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes"))));
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
        self.link().send(message)
    }

    /// Waits for the next message of the rank before.
    ///
    /// # Errors
    /// When that rank gives no sign of life.
    pub fn receive(&self) -> Result<Vec<u8>> {
        self.link().receive()
    }

    fn link(&self) -> &dyn Link {
        self.link.as_deref().expect("there are several ranks")
    }

    /// Returns the root's message on every rank. `message` is `Some` on the root and `None` on the other ranks.
    ///
    /// # Errors
    /// Those of [`Cluster::send`] and [`Cluster::receive`].
    pub fn broadcast(&self, message: Option<Vec<u8>>) -> Result<Vec<u8>> {
        let Some(link) = &self.link else { return Ok(message.expect("the root has a message")) };
        if let Some(message) = message {
            link.send(message.len().to_le_bytes().to_vec())?;
            message.chunks(PIECE).try_for_each(|piece| link.send(piece.to_vec()))?;
            return Ok(message);
        }
        let pass_on = |message: &[u8]| if self.is_last() { Ok(()) } else { link.send(message.to_vec()) };
        let length = link.receive()?;
        pass_on(&length)?;
        let length = number(&length);
        let mut message = Vec::with_capacity(length);
        while message.len() < length {
            let piece = link.receive()?;
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
        let Some(link) = &self.link else { return Ok(Some(vec![own])) };
        if self.is_root() {
            let others = (1..self.ranks()).map(|_| link.receive());
            return std::iter::once(Ok(own)).chain(others).collect::<Result<_>>().map(Some);
        }
        (1..self.rank).try_for_each(|_| link.send(link.receive()?))?;
        link.send(own)?;
        Ok(None)
    }

    /// Returns the messages of all ranks on every rank, in their order.
    ///
    /// # Errors
    /// Those of [`Cluster::send`] and [`Cluster::receive`].
    pub fn all_gather(&self, own: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let Some(link) = &self.link else { return Ok(vec![own]) };
        link.send(own.clone())?;
        // From the rank before, then from the one before that.
        let mut all = vec![own];
        for place in 1..self.ranks() {
            let message = link.receive()?;
            if place + 1 < self.ranks() {
                link.send(message.clone())?;
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
        let all = self.gather(Vec::new())?;
        self.broadcast(all.map(|_| Vec::new())).map(drop)
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

/// A number that was sent as a message.
fn number(message: &[u8]) -> usize {
    usize::from_le_bytes(message.try_into().expect("a message of one number"))
}
