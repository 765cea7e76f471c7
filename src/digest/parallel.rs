//! Hashing on all CPUs. Threads hash the spans of a file in turn. The spans of a stream are read by one
//! thread and hashed by other threads.

use std::io::{self, ErrorKind, Read};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, TrySendError};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use sealmount_sys::SealedMapping;

use crate::digest::text::{Algorithm, Digest};
use crate::digest::tree::{Hash, MerkleTree};
use crate::util::io::read_at;
use crate::util::memory::{threads_that_fit, try_buffers, try_filled};
use crate::util::threads::{Stop, run_parallel, useful_threads};

/// The number of bytes that a thread reads and hashes at a time. The cost of a system call is small against
/// it, and the bytes stay in the cache of the core. Threads stop within a piece.
pub(crate) const PIECE_SIZE: usize = 128 * 1024;

/// The highest number of threads that hash the spans of a stream. Reading a stream is slower than hashing it,
/// so more threads would only wait.
const HELPERS_MAX: usize = 3;

/// The number of spans of a stream that wait for a thread. With one span for each thread, this is the
/// memory that a stream needs: 512 KiB each.
const WAITING_MAX: usize = 2;

/// The reason why the work on a file or a stream ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Halted {
    /// There is no memory for buffers.
    NoMemory(Errno),
    /// The caller's callback ended the work.
    Cancelled,
}

/// A callback for the number of bytes that are done. The callback can end the work.
pub(crate) type OnProgress<'a> = &'a mut dyn FnMut(u64) -> ControlFlow<()>;

/// The threads that work on the spans of a file.
pub(crate) struct SpanReader {
    /// The tree whose spans are read.
    pub tree: MerkleTree,
    /// The highest number of threads, the calling thread included.
    pub threads: usize,
    /// Whether spans are hashed. If not, they only divide the work.
    pub hashes: bool,
}

impl SpanReader {
    /// Calls `read` for each piece of each span, with a buffer to fill and the position of the piece. `read`
    /// returns `None`, or the bytes of the piece if they are in memory already. Hashes these bytes, or the
    /// bytes in the buffer. Returns the hashes of the spans, in order.
    ///
    /// The calling thread calls `progress` after each of its pieces. If a thread fails, or `progress`
    /// ends the work or panics, all threads stop within a piece.
    pub fn run<'a, E: From<Halted> + Send>(
        &self,
        read: impl Fn(&mut [u8], u64) -> Result<Option<&'a [u8]>, E> + Sync,
        progress: OnProgress,
    ) -> Result<Vec<Hash>, E> {
        let no_memory = |errno| E::from(Halted::NoMemory(errno));
        let spans = self.tree.spans();
        let hashes = Hashes::new(if self.hashes { spans } else { 0 }).map_err(no_memory)?;
        let threads = self.threads.min(spans.max(1));
        let mut buffers = try_buffers(threads, PIECE_SIZE).into_iter();
        let own_buffer = buffers.next().ok_or(Errno::NOMEM).map_err(no_memory)?;
        let helpers = threads_that_fit(buffers.len()).map_err(no_memory)?;

        let next = AtomicU64::new(0);
        let done = AtomicU64::new(0);
        let stop = Stop::default();
        let work = |mut buffer: Vec<u8>, progress: OnProgress| -> Result<(), E> {
            let guard = stop.unless_finished();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(span) = self.tree.span(number) else {
                    guard.finished();
                    return Ok(());
                };
                let mut hasher = self.hashes.then(|| self.tree.span_hasher());
                let mut offset = span.start;
                while offset < span.end {
                    if stop.is_set() {
                        // The thread that stopped the others returns the error.
                        return Ok(());
                    }
                    let length = buffer.len().min((span.end - offset) as usize);
                    let buffer = &mut buffer[..length];
                    let in_memory = read(buffer, offset)?;
                    if let Some(hasher) = &mut hasher {
                        hasher.update(in_memory.unwrap_or(buffer));
                    }
                    offset += length as u64;
                    let so_far = done.fetch_add(length as u64, Ordering::Relaxed) + length as u64;
                    if progress(so_far).is_break() {
                        return Err(Halted::Cancelled.into());
                    }
                }
                if let Some(hasher) = hasher {
                    hashes.set(number, hasher.finish()).map_err(no_memory)?;
                }
            }
        };
        let work = &work;
        let silent = |buffer| work(buffer, &mut |_| ControlFlow::Continue(()));
        let helpers = buffers.take(helpers).map(|buffer| move || silent(buffer));
        run_parallel(helpers, || work(own_buffer, progress))?;
        // A thread that was stopped leaves spans without a hash.
        if stop.is_set() {
            return Err(Halted::Cancelled.into());
        }
        Ok(hashes.into_inner())
    }
}

/// The hashes of spans, which arrive in any order.
pub(crate) struct Hashes(Mutex<Vec<Hash>>);

impl Hashes {
    /// Allocates room for `spans` hashes. More hashes are allocated when they arrive.
    pub fn new(spans: usize) -> Result<Hashes, Errno> {
        Ok(Hashes(Mutex::new(try_filled(spans, [0; 64])?)))
    }

    pub fn set(&self, span: u64, hash: Hash) -> Result<(), Errno> {
        let span = usize::try_from(span).map_err(|_| Errno::NOMEM)?;
        let mut hashes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if span >= hashes.len() {
            let more = span + 1 - hashes.len();
            hashes.try_reserve(more).map_err(|_| Errno::NOMEM)?;
            hashes.resize(span + 1, [0; 64]);
        }
        hashes[span] = hash;
        Ok(())
    }

    pub fn into_inner(self) -> Vec<Hash> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A span of a stream and its number.
type Span = (u64, Vec<u8>);

/// A function that hands over a span, and returns a buffer for the next span.
pub(crate) type HandOver<'a, E> = &'a mut dyn FnMut(u64, Vec<u8>) -> Result<Vec<u8>, E>;

fn helpers_for(spans: usize) -> usize {
    useful_threads().saturating_sub(1).clamp(1, HELPERS_MAX).min(spans.saturating_sub(1))
}

/// Returns the highest number of buffers of [`share_spans`], each of one span.
pub(crate) fn buffers_for(spans: usize) -> usize {
    let others = spans.saturating_sub(1);
    let helpers = helpers_for(spans);
    if helpers > 0 { 1 + (helpers + WAITING_MAX).min(others) } else { 1 }
}

/// Runs `produce` in the calling thread. `produce` makes the spans of a stream in order and hands over each
/// span. Other threads call `consume` for the spans. The calling thread calls `consume` too if all other
/// threads are busy, or if there is no memory for more buffers.
///
/// `spans` is the expected number of spans. If a thread fails, or `produce` fails or panics, each other
/// thread stops after its current span.
pub(crate) fn share_spans<E: From<Halted> + Send>(
    spans: usize,
    span_size: usize,
    consume: impl Fn(u64, &[u8]) -> Result<(), E> + Sync,
    produce: impl FnOnce(HandOver<E>) -> Result<(), E>,
) -> Result<(), E> {
    let no_memory = |errno| E::from(Halted::NoMemory(errno));
    let helpers = helpers_for(spans);
    // The producer already has one buffer.
    let mut spare = try_buffers(buffers_for(spans) - 1, span_size);
    let helpers = threads_that_fit(helpers.min(spare.len())).map_err(no_memory)?;

    let (sender, receiver) = mpsc::sync_channel::<Span>(WAITING_MAX);
    let receiver = Mutex::new(receiver);
    let (give_back, given_back) = mpsc::sync_channel(spare.len() + 1);
    let stop = Stop::default();
    let work = || {
        loop {
            let next = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
            // The producer is finished, and no span is left.
            let Ok((number, span)) = next else { return };
            if stop.is_set() {
                return;
            }
            let consumed = consume(number, &span).map(|()| span);
            let failed = consumed.is_err();
            // There is room for every buffer.
            let _ = give_back.try_send(consumed);
            if failed {
                return;
            }
        }
    };
    let helper = || -> Result<(), E> {
        work();
        Ok(())
    };
    run_parallel(std::iter::repeat_n(&helper, helpers), || -> Result<(), E> {
        // The sender is moved here, so that a panic drops it. The helpers wait for this.
        let sender = sender;
        let guard = stop.unless_finished();
        let result = produce(&mut |number, span| {
            for consumed in given_back.try_iter() {
                spare.push(consumed?);
            }
            let Some(buffer) = spare.pop() else {
                consume(number, &span)?;
                return Ok(span);
            };
            match sender.try_send((number, span)) {
                Ok(()) => Ok(buffer),
                Err(TrySendError::Full((_, span)) | TrySendError::Disconnected((_, span))) => {
                    spare.push(buffer);
                    consume(number, &span)?;
                    Ok(span)
                }
            }
        });
        if result.is_ok() {
            guard.finished();
        } else {
            drop(guard);
        }
        // The helpers, and then this thread, learn that no span follows.
        drop(sender);
        result?;
        work();
        Ok(())
    })?;
    given_back.try_iter().try_for_each(|consumed| consumed.map(drop))
}

/// Fills the buffer from a reader. Truncates the buffer if the stream ends.
pub(crate) fn read_span(reader: &mut (impl Read + ?Sized), buffer: &mut Vec<u8>) -> io::Result<()> {
    let mut length = 0;
    while length < buffer.len() {
        match reader.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(more) if more <= buffer.len() - length => length += more,
            Ok(_) => {
                let message = "the reader returned more bytes than it had room for";
                return Err(io::Error::new(ErrorKind::InvalidData, message));
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer.truncate(length);
    Ok(())
}

impl From<Halted> for io::Error {
    fn from(halted: Halted) -> io::Error {
        match halted {
            Halted::NoMemory(errno) => errno.into(),
            Halted::Cancelled => ErrorKind::Interrupted.into(),
        }
    }
}

impl Digest {
    /// Computes the fs-verity digest of a regular file on all CPUs, with blocks of 4096 bytes and no salt.
    /// The position of the descriptor is not used and does not change.
    ///
    /// The digest is computed in user space, whether or not the file has fs-verity. At most eight threads
    /// are used, the calling thread included.
    ///
    /// ```
    /// use sealmount::{Algorithm, Digest};
    ///
    /// let file = std::fs::File::open("/etc/passwd")?;
    /// let digest = Digest::of_file(Algorithm::Sha256, &file)?;
    /// assert_eq!(digest, Digest::of_bytes(Algorithm::Sha256, &std::fs::read("/etc/passwd")?));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](ErrorKind::InvalidInput) if the file is not a regular file,
    /// [`UnexpectedEof`](ErrorKind::UnexpectedEof) or [`InvalidData`](ErrorKind::InvalidData) if its size
    /// changes meanwhile, and the errors of [pread(2)](https://man7.org/linux/man-pages/man2/pread.2.html).
    pub fn of_file(algorithm: Algorithm, file: impl AsFd) -> io::Result<Digest> {
        let file = file.as_fd();
        let stat = fstat(file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
        }
        // The size of a regular file is not negative.
        let size = stat.st_size as u64;
        let digest =
            of_open_file::<io::Error>(algorithm, file, size, &mut |_| ControlFlow::Continue(()))?;
        match read_at(file, &mut [0], size)? {
            0 => Ok(digest),
            _ => Err(io::Error::new(ErrorKind::InvalidData, "the file grew while it was read")),
        }
    }

    /// Computes the fs-verity digest of a stream, which the calling thread reads while other CPUs hash.
    /// Uses at most 4 threads and 3 MiB of memory.
    ///
    /// # Errors
    ///
    /// The errors of the reader; [`OutOfMemory`](ErrorKind::OutOfMemory).
    pub fn of_reader(algorithm: Algorithm, mut reader: impl Read) -> io::Result<Digest> {
        // The size is not known yet. The size matters only for a file of a single block.
        let tree = MerkleTree::new(algorithm, u64::MAX);
        let span_size = tree.span_size();
        let mut span = try_filled(span_size, 0)?;
        read_span(&mut reader, &mut span)?;
        if span.len() < span_size {
            return Ok(Digest::of_bytes(algorithm, &span));
        }
        let hashes = Hashes::new(0)?;
        let mut size = 0;
        let consume = |number: u64, span: &[u8]| -> io::Result<()> {
            let mut hasher = tree.span_hasher();
            hasher.update(span);
            Ok(hashes.set(number, hasher.finish())?)
        };
        share_spans(usize::MAX, span_size, consume, |hand_over| {
            let mut number = 0;
            while !span.is_empty() {
                size += span.len() as u64;
                span = hand_over(number, span)?;
                span.resize(span_size, 0);
                read_span(&mut reader, &mut span)?;
                number += 1;
            }
            Ok(())
        })?;
        Ok(MerkleTree::new(algorithm, size).digest(hashes.into_inner()))
    }
}

/// Computes the digest of the first `size` bytes of a file on all CPUs.
pub(crate) fn of_open_file<E: From<Halted> + From<io::Error> + Send>(
    algorithm: Algorithm,
    file: BorrowedFd,
    size: u64,
    progress: OnProgress,
) -> Result<Digest, E> {
    let read = |piece: &mut [u8], offset| match read_at(file, piece, offset) {
        Ok(length) if length == piece.len() => Ok(None),
        Ok(_) => Err(io::Error::new(ErrorKind::UnexpectedEof, "the file shrank while it was read")),
        Err(errno) => Err(errno.into()),
    };
    of_pieces(algorithm, size, |piece, offset| read(piece, offset).map_err(E::from), progress)
}

/// Computes the digest of a sealed memfd on all CPUs, without a copy of its bytes.
pub(crate) fn of_sealed_memfd<E: From<Halted> + From<io::Error> + Send>(
    algorithm: Algorithm,
    memfd: BorrowedFd,
    size: u64,
    progress: OnProgress,
) -> Result<Digest, E> {
    let Some(bytes) = SealedMapping::new(memfd).ok().filter(|bytes| bytes.len() as u64 == size)
    else {
        // The memfd has a hole, or there is no room for the mapping.
        return of_open_file(algorithm, memfd, size, progress);
    };
    let piece = |buffer: &mut [u8], offset| Ok(Some(&bytes[offset as usize..][..buffer.len()]));
    of_pieces(algorithm, size, piece, progress)
}

/// Computes the digest of `size` bytes on all CPUs. `read` is the function of [`SpanReader::run`].
fn of_pieces<'a, E: From<Halted> + Send>(
    algorithm: Algorithm,
    size: u64,
    read: impl Fn(&mut [u8], u64) -> Result<Option<&'a [u8]>, E> + Sync,
    progress: OnProgress,
) -> Result<Digest, E> {
    let tree = MerkleTree::new(algorithm, size);
    let reader = SpanReader { tree, threads: useful_threads(), hashes: true };
    Ok(tree.digest(reader.run(read, progress)?))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::time::Duration;

    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

    use super::*;

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn file_digest_rejects_a_directory() {
        let error = Digest::of_file(Algorithm::Sha256, File::open("/").unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }

    /// A destructor may run while its thread unwinds.
    #[test]
    fn digest_computed_while_unwinding_is_right() {
        let content: Vec<u8> = (0..4_195_081u32).map(|n| (n / 4096 * 31 + n) as u8).collect();
        let expected = Digest::of_bytes(Algorithm::Sha256, &content);
        let file = file(&content);
        struct DigestOnDrop<'a>(&'a File, &'a mut Vec<Digest>);
        impl Drop for DigestOnDrop<'_> {
            fn drop(&mut self) {
                self.1.push(Digest::of_file(Algorithm::Sha256, self.0).unwrap());
            }
        }
        let mut digests = Vec::new();
        for _ in 0..30 {
            let unwind = || {
                let _on_drop = DigestOnDrop(&file, &mut digests);
                std::panic::resume_unwind(Box::new("on purpose"));
            };
            catch_unwind(AssertUnwindSafe(unwind)).unwrap_err();
        }
        assert_eq!(digests, vec![expected; 30]);
    }

    /// Reads spans that are never finished unless the threads are stopped.
    fn run_endless(progress: OnProgress) -> Result<Vec<Hash>, io::Error> {
        let tree = MerkleTree::new(Algorithm::Sha256, 1 << 40);
        let reader = SpanReader { tree, threads: 4, hashes: false };
        let read = |_: &mut [u8], _| {
            std::thread::sleep(Duration::from_millis(1));
            Ok(None)
        };
        reader.run(read, progress)
    }

    #[test]
    fn cancelled_reader_stops_all_threads() {
        let error = run_endless(&mut |_| ControlFlow::Break(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Interrupted);
    }

    #[test]
    fn panic_in_progress_stops_all_threads() {
        let run = || run_endless(&mut |_| panic!("on purpose"));
        let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"on purpose"));
    }

    #[test]
    fn panic_of_the_producer_ends_the_helpers() {
        let consume = |_, _: &[u8]| Ok::<_, io::Error>(());
        let run = || {
            share_spans(1000, 4096, consume, |hand_over| {
                hand_over(0, vec![0; 4096])?;
                panic!("on purpose")
            })
        };
        let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"on purpose"));
    }

    proptest! {
        #[test]
        fn file_and_reader_have_the_digest_of_their_bytes(
            data: Vec<u8>,
            repeat in 1..30_000usize,
            chunk in 1..3_000_000usize,
        ) {
            let data = data.repeat(repeat);
            for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
                let expected = Digest::of_bytes(algorithm, &data);
                prop_assert_eq!(Digest::of_file(algorithm, file(&data)).unwrap(), expected);
                let reader = Chunks { data: &data, chunk };
                prop_assert_eq!(Digest::of_reader(algorithm, reader).unwrap(), expected);
                prop_assert_eq!(of_memfd(algorithm, &data, data.len() as u64), expected);
                let mut with_hole = data.clone();
                with_hole.resize(data.len() + 10_000, 0);
                let expected = Digest::of_bytes(algorithm, &with_hole);
                prop_assert_eq!(of_memfd(algorithm, &data, with_hole.len() as u64), expected);
            }
        }
    }

    /// Returns the digest of a sealed memfd of `size` bytes, which starts with `data`.
    fn of_memfd(algorithm: Algorithm, data: &[u8], size: u64) -> Digest {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let mut memfd = File::from(memfd_create("test", flags).unwrap());
        memfd.write_all(data).unwrap();
        memfd.set_len(size).unwrap();
        fcntl_add_seals(&memfd, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
        let go_on = &mut |_| ControlFlow::Continue(());
        of_sealed_memfd::<io::Error>(algorithm, memfd.as_fd(), size, go_on).unwrap()
    }

    /// A reader that returns at most so many bytes at a time.
    struct Chunks<'a> {
        data: &'a [u8],
        chunk: usize,
    }

    impl Read for Chunks<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = buffer.len().min(self.chunk);
            self.data.read(&mut buffer[..length])
        }
    }
}
