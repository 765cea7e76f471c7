//! The check of every object of an image, on all CPUs.
//!
//! A thread reads a directory of the image, or checks objects that another thread found. The result does not
//! depend on the order of this work: each object is checked once. A second walk in a fixed order finds the
//! files that need a failed object.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::fstatfs;
use rustix::io::Errno;

use crate::digest::batch::Batch;
use crate::digest::measure::measure;
use crate::digest::parallel::{Halted, of_open_file};
use crate::digest::tree::MerkleTree;
use crate::digest::{Digest, VerityStatus, VerityUnavailable};
use crate::erofs::ErofsMount;
use crate::kernel::{KernelError, Operation};
use crate::objects::error::ObjectsError;
use crate::objects::reference::{ImageObject, ObjectKey, Reference};
use crate::objects::report::{
    CheckProgress, CheckReport, ObjectCheck, ObjectFailure, ObjectProblem, ObjectProblemKind,
};
use crate::objects::store::{Found, NotFound, Store, unreadable};
use crate::objects::walk::{Access, Entry, Pending, References, Tree};
use crate::util::io::read_at;
use crate::util::memory::threads_that_fit;
use crate::util::threads::{Stop, run_parallel, useful_threads};

/// The number of failures that a report names, each with the object and a file.
const NAMED_MAX: usize = 10;

/// The number of objects that a thread hands to another thread at once.
const HANDED_OVER: usize = 64;

/// All CPUs together hash a file of more than this size, in bytes. Each CPU hashes smaller files alone.
const LARGE: u64 = 8 << 20;

/// The minimum time between two calls of the caller's callback, and the longest sleep of a thread.
const TICK: Duration = Duration::from_millis(10);

/// The effect of an object that the kernel cannot verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VerityNeed {
    /// No effect: objects are not measured.
    None,
    /// [`CheckReport::unverified`] has the reason.
    IfAvailable,
    /// The object fails the check.
    Required,
}

/// A check of the objects of an image.
pub(crate) struct Check<'a> {
    pub image: &'a ErofsMount,
    pub store: Store<'a>,
    /// The paths of the object directories, for messages.
    pub directories: Vec<PathBuf>,
    pub check: ObjectCheck,
    pub verity: VerityNeed,
}

/// A callback for the progress, which can end the check.
pub(crate) type OnCheckProgress<'a> = &'a mut dyn FnMut(CheckProgress) -> ControlFlow<()>;

/// A function that a thread calls between two objects. Only the calling thread has one with an effect.
type Tick<'a> = &'a mut dyn FnMut(&Shared) -> Result<(), ObjectsError>;

impl Check<'_> {
    /// Checks every object. Returns a report, also if objects fail.
    pub fn run(&self, progress: OnCheckProgress) -> Result<CheckReport, ObjectsError> {
        let shared = Shared::new(self)?;
        let total = inodes(self.image)?;
        let mut next = Instant::now() + TICK;
        let mut tick = |shared: &Shared| {
            let now = Instant::now();
            if now < next {
                return Ok(());
            }
            next = now + TICK;
            let later = shared.large_left.load(Ordering::Relaxed);
            let done = shared.tree.names().saturating_sub(later);
            let (bytes, total_bytes) = shared.bytes.of(shared.tree.names(), total);
            match progress(CheckProgress { done, total, bytes, total_bytes }) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(shared.cancelled()),
            }
        };
        shared.run_threads(&mut tick)?;
        shared.bytes.all_found.store(true, Ordering::Relaxed);
        shared.hash_large(&mut tick)?;
        shared.into_report()
    }
}

/// Returns the number of inodes of an EROFS. statfs(2) reports the number of inodes as the inodes that are
/// not free.
fn inodes(image: &ErofsMount) -> Result<u64, ObjectsError> {
    let path = image.source().path();
    let statfs =
        fstatfs(image).map_err(|errno| KernelError::new(Operation::ListObjects, errno).on(path))?;
    Ok(statfs.f_files.wrapping_sub(statfs.f_ffree))
}

/// An object to be checked.
struct Job {
    key: ObjectKey,
    reference: Reference,
    /// The index of the object directory that has the object.
    directory: Option<usize>,
}

/// A problem of an object, and the index of the object directory that has the object.
struct Located {
    problem: ObjectProblem,
    directory: Option<usize>,
}

impl From<NotFound> for Located {
    fn from(NotFound { index, problem }: NotFound) -> Located {
        let directory = (problem.kind() != ObjectProblemKind::Missing).then_some(index);
        Located { problem, directory }
    }
}

/// The work that is left.
#[derive(Default)]
struct Queue {
    directories: Vec<Pending>,
    jobs: VecDeque<Vec<Job>>,
    /// The number of threads that read a directory, and may find more work.
    reading: usize,
    /// The number of threads that wait for work.
    waiting: usize,
}

impl Queue {
    fn is_finished(&self) -> bool {
        self.directories.is_empty() && self.jobs.is_empty() && self.reading == 0
    }
}

/// The next work of a thread.
enum Work {
    Check(Vec<Job>),
    Read(Pending),
    Wait,
}

/// The bytes of the objects whose content is checked.
#[derive(Default)]
struct Bytes {
    found: AtomicU64,
    done: AtomicU64,
    /// All directories are read, so that `found` is the total.
    all_found: AtomicBool,
}

impl Bytes {
    /// Returns the bytes that are done, and the total or its estimate. `names` of about `inodes` names are
    /// found.
    ///
    /// Large objects come last. Without an estimate by bytes, the progress would stand still at their names.
    fn of(&self, names: u64, inodes: u64) -> (u64, u64) {
        let done = self.done.load(Ordering::Relaxed);
        let found = self.found.load(Ordering::Relaxed).max(done);
        if self.all_found.load(Ordering::Relaxed) || names == 0 {
            return (done, found);
        }
        let estimate = u128::from(found) * u128::from(inodes.max(names)) / u128::from(names);
        (done, u64::try_from(estimate).unwrap_or(u64::MAX))
    }
}

#[derive(Default)]
struct Totals {
    files: u64,
    objects: u64,
    bytes: u64,
    without_digest: u64,
    unverified: Option<VerityUnavailable>,
}

/// The state that threads share.
struct Shared<'a> {
    check: &'a Check<'a>,
    tree: Tree<'a>,
    threads: usize,
    queue: Mutex<Queue>,
    /// There is work, or the work is finished.
    available: Condvar,
    /// The work is finished.
    finished: Condvar,
    stop: Stop,
    seen: Mutex<BTreeSet<ObjectKey>>,
    failures: Mutex<BTreeMap<ObjectKey, Located>>,
    large: Mutex<Vec<Job>>,
    /// The number of large objects that are not hashed yet.
    large_left: AtomicU64,
    bytes: Bytes,
    totals: Mutex<Totals>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Shared<'a> {
    fn new(check: &'a Check<'a>) -> Result<Shared<'a>, ObjectsError> {
        let tree = Tree::new(check.image);
        let queue = Queue { directories: vec![tree.root()?], ..Queue::default() };
        Ok(Shared {
            check,
            tree,
            threads: useful_threads(),
            queue: Mutex::new(queue),
            available: Condvar::new(),
            finished: Condvar::new(),
            stop: Stop::default(),
            seen: Mutex::default(),
            failures: Mutex::default(),
            large: Mutex::default(),
            large_left: AtomicU64::new(0),
            bytes: Bytes::default(),
            totals: Mutex::default(),
        })
    }

    fn no_memory(&self, errno: Errno) -> ObjectsError {
        KernelError::new(Operation::AllocateBuffers, errno).on(self.tree.image()).into()
    }

    fn cancelled(&self) -> ObjectsError {
        ObjectsError::Cancelled { image: self.tree.image().to_owned() }
    }

    /// Runs the check in new threads, each with a working directory of its own. The calling thread calls the
    /// caller's callback. If no thread can be started, the calling thread does the work.
    fn run_threads(&self, tick: Tick) -> Result<(), ObjectsError> {
        let fit = threads_that_fit(self.threads).map_err(|errno| self.no_memory(errno))?;
        let workers: Vec<_> = (0..fit).map_while(|_| Worker::new(self).ok()).collect();
        let running = Arc::new(());
        let helpers = workers.into_iter().map(|worker| {
            let running = running.clone();
            move || {
                let result = worker.run_with_own_directory();
                let queue = lock(&self.queue);
                drop(running);
                drop(queue);
                self.finished.notify_all();
                result
            }
        });
        run_parallel(helpers, || {
            let guard = self.stop.unless_finished();
            while self.waits_for_threads(&running) {
                tick(self)?;
            }
            if !self.is_finished() {
                Worker::new(self)?.run(Access::ByDescriptor, tick)?;
            }
            guard.finished();
            Ok(())
        })?;
        // A thread that was stopped leaves work. The thread that stopped it panicked in the callback.
        if self.stop.is_set() { Err(self.cancelled()) } else { Ok(()) }
    }

    /// Returns whether a thread holds `running`. Waits for the end of the last thread for at most a tick.
    fn waits_for_threads(&self, running: &Arc<()>) -> bool {
        let queue = lock(&self.queue);
        let is_running = Arc::strong_count(running) > 1;
        if is_running {
            drop(self.finished.wait_timeout(queue, TICK));
        }
        is_running
    }

    /// Returns whether the work is finished, or the threads must stop.
    fn is_finished(&self) -> bool {
        lock(&self.queue).is_finished() || self.stop.is_set()
    }

    /// Returns the next work, or `None` if the work is finished.
    fn next_work(&self) -> Option<Work> {
        let mut queue = lock(&self.queue);
        // Objects come before directories, so that few objects wait.
        if let Some(jobs) = queue.jobs.pop_front() {
            return Some(Work::Check(jobs));
        }
        if let Some(directory) = queue.directories.pop() {
            queue.reading += 1;
            return Some(Work::Read(directory));
        }
        if queue.reading == 0 {
            drop(queue);
            self.available.notify_all();
            return None;
        }
        // The wait has a limit, because no notification comes if the threads must stop.
        queue.waiting += 1;
        let (mut queue, _) =
            self.available.wait_timeout(queue, TICK).unwrap_or_else(PoisonError::into_inner);
        queue.waiting -= 1;
        Some(Work::Wait)
    }

    fn end_reading(&self, subdirectories: Vec<Pending>) {
        let mut queue = lock(&self.queue);
        queue.reading -= 1;
        queue.directories.extend(subdirectories);
        let is_awaited = queue.waiting > 0;
        drop(queue);
        if is_awaited {
            self.available.notify_all();
        }
    }

    /// Hands objects to another thread, or returns them if enough objects wait already.
    fn hand_over(&self, jobs: Vec<Job>) -> Option<Vec<Job>> {
        let mut queue = lock(&self.queue);
        if queue.jobs.len() >= self.threads {
            return Some(jobs);
        }
        queue.jobs.push_back(jobs);
        let is_awaited = queue.waiting > 0;
        drop(queue);
        if is_awaited {
            self.available.notify_one();
        }
        None
    }

    /// Notes that an object fails the check. A lack of memory or descriptors is an error of the check itself.
    fn fail(&self, job: Job, problem: ObjectProblem) -> Result<(), ObjectsError> {
        match problem {
            ObjectProblem::Unreadable(error)
                if matches!(error.errno, Errno::MFILE | Errno::NFILE | Errno::NOMEM) =>
            {
                Err(error.on(job.reference.object.unwrap_or_default()).into())
            }
            problem => {
                let located = Located { problem, directory: job.directory };
                lock(&self.failures).insert(job.key, located);
                Ok(())
            }
        }
    }

    fn compare(&self, job: Job, found: Digest) -> Result<(), ObjectsError> {
        match job.reference.digest {
            Some(expected) if expected != found => {
                self.fail(job, ObjectProblem::WrongContent { found })
            }
            _ => Ok(()),
        }
    }

    /// Hashes the large objects one after the other, each on all CPUs.
    fn hash_large(&self, tick: Tick) -> Result<(), ObjectsError> {
        for job in std::mem::take(&mut *lock(&self.large)) {
            let end = self.bytes.done.load(Ordering::Relaxed) + job.reference.size;
            match self.digest_of_large(&job.reference, tick)? {
                Ok(Some(found)) => self.compare(job, found)?,
                Ok(None) => {}
                Err(problem) => self.fail(job, problem)?,
            }
            self.bytes.done.store(end, Ordering::Relaxed);
            self.large_left.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Hashes a large object on all CPUs.
    fn digest_of_large(
        &self,
        reference: &Reference,
        tick: Tick,
    ) -> Result<Result<Option<Digest>, ObjectProblem>, ObjectsError> {
        let Reference { object: Some(object), size, digest: Some(digest), .. } = reference else {
            return Ok(Ok(None));
        };
        let found = self.check.store.find(object).map_err(ObjectProblem::from);
        let open = |found: Found| match found.size == *size {
            true => found.open(),
            false => Err(ObjectProblem::Changed),
        };
        let file = match found.and_then(open) {
            Ok(file) => file,
            Err(problem) => return Ok(Err(problem)),
        };
        let mut cancelled = None;
        let start = self.bytes.done.load(Ordering::Relaxed);
        let mut progress = |done: u64| {
            self.bytes.done.store(start + done, Ordering::Relaxed);
            match tick(self) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    cancelled = Some(error);
                    ControlFlow::Break(())
                }
            }
        };
        let algorithm = digest.algorithm();
        let result = of_open_file::<HashError>(algorithm, file.as_fd(), *size, &mut progress);
        if let Some(error) = cancelled {
            return Err(error);
        }
        match result {
            Ok(found) => Ok(Ok(Some(found))),
            Err(HashError::Halted(Halted::NoMemory(errno))) => Err(self.no_memory(errno)),
            Err(HashError::Halted(Halted::Cancelled)) => Err(self.cancelled()),
            Err(HashError::Read(error)) => Ok(Err(match Errno::from_io_error(&error) {
                Some(errno) => unreadable(errno),
                None => ObjectProblem::Changed,
            })),
        }
    }

    /// Makes the report. If objects failed, walks the image once more to find a file for each.
    fn into_report(self) -> Result<CheckReport, ObjectsError> {
        let unwrap = PoisonError::into_inner;
        let mut problems = self.failures.into_inner().unwrap_or_else(unwrap);
        let mut by_kind = BTreeMap::new();
        for located in problems.values() {
            *by_kind.entry(located.problem.kind()).or_insert(0) += 1;
        }
        let failed = problems.len() as u64;
        let mut failures = Vec::new();
        let mut references = References::new(self.check.image);
        while !problems.is_empty() && failures.len() < NAMED_MAX {
            let Some((path, reference)) = references.next().transpose()? else { break };
            if let Some(Located { problem, directory }) = problems.remove(&reference.key()) {
                let Reference { object, size, digest, .. } = reference;
                let object = ImageObject { path, object: object.unwrap_or_default(), size, digest };
                let directory = directory.map(|number| self.check.directories[number].clone());
                failures.push(ObjectFailure { object, directory, problem });
            }
        }
        let totals = self.totals.into_inner().unwrap_or_else(PoisonError::into_inner);
        let Totals { files, objects, bytes, without_digest, unverified } = totals;
        Ok(CheckReport {
            check: self.check.check,
            files,
            objects,
            bytes,
            without_digest,
            unverified,
            failed,
            failed_by_kind: by_kind.into_iter().collect(),
            failures,
        })
    }
}

/// The reason why a large object is not hashed.
enum HashError {
    Halted(Halted),
    Read(io::Error),
}

impl From<Halted> for HashError {
    fn from(halted: Halted) -> HashError {
        HashError::Halted(halted)
    }
}

impl From<io::Error> for HashError {
    fn from(error: io::Error) -> HashError {
        HashError::Read(error)
    }
}

/// A thread of the check.
struct Worker<'a> {
    shared: &'a Shared<'a>,
    /// The files that are read and not hashed yet, if contents are checked.
    batch: Option<Batch<Job>>,
    totals: Totals,
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared<'a>) -> Result<Worker<'a>, ObjectsError> {
        let batch = match shared.check.check {
            ObjectCheck::Content => Some(Batch::new().map_err(|errno| shared.no_memory(errno))?),
            _ => None,
        };
        Ok(Worker { shared, batch, totals: Totals::default() })
    }

    fn run_with_own_directory(self) -> Result<(), ObjectsError> {
        let guard = self.shared.stop.unless_finished();
        let access = Access::of_own_thread().map_err(|errno| {
            KernelError::new(Operation::ListObjects, errno).on(self.shared.tree.image())
        })?;
        self.run(access, &mut |_| Ok(()))?;
        guard.finished();
        Ok(())
    }

    fn run(mut self, access: Access, tick: Tick) -> Result<(), ObjectsError> {
        let guard = self.shared.stop.unless_finished();
        while let Some(work) = self.shared.next_work() {
            if self.shared.stop.is_set() {
                // The thread that stopped the others returns the error.
                return Ok(());
            }
            match work {
                Work::Check(jobs) => self.check_all(jobs, tick)?,
                Work::Read(directory) => self.read(directory, access, tick)?,
                Work::Wait => tick(self.shared)?,
            }
        }
        self.flush()?;
        let mut totals = lock(&self.shared.totals);
        totals.files += self.totals.files;
        totals.objects += self.totals.objects;
        totals.bytes = totals.bytes.saturating_add(self.totals.bytes);
        totals.without_digest += self.totals.without_digest;
        totals.unverified = worse(totals.unverified, self.totals.unverified);
        guard.finished();
        Ok(())
    }

    /// Reads a directory, and checks its objects or hands them to other threads.
    fn read(&mut self, directory: Pending, access: Access, tick: Tick) -> Result<(), ObjectsError> {
        let shared = self.shared;
        let mut directory = shared.tree.open(directory, access)?;
        let (mut subdirectories, mut jobs) = (Vec::new(), Vec::new());
        while let Some(entry) = shared.tree.next_entry(&mut directory) {
            match entry? {
                Entry::Directory(subdirectory) => subdirectories.push(subdirectory),
                Entry::File(_, reference) => jobs.extend(self.job(reference)),
                Entry::Other => {}
            }
            if jobs.len() == HANDED_OVER
                && let Some(jobs) = shared.hand_over(std::mem::take(&mut jobs))
            {
                self.check_all(jobs, tick)?;
            }
            if shared.stop.is_set() {
                return Ok(());
            }
            tick(shared)?;
        }
        shared.end_reading(subdirectories);
        self.check_all(jobs, tick)
    }

    /// Counts a file. Returns its object, or `None` if an earlier file has the same object.
    fn job(&mut self, reference: Reference) -> Option<Job> {
        self.totals.files += 1;
        let key = reference.key();
        if !lock(&self.shared.seen).insert(key) {
            return None;
        }
        self.totals.objects += 1;
        self.totals.bytes = self.totals.bytes.saturating_add(reference.size);
        Some(Job { key, reference, directory: None })
    }

    fn check_all(&mut self, jobs: Vec<Job>, tick: Tick) -> Result<(), ObjectsError> {
        for mut job in jobs {
            if self.shared.stop.is_set() {
                return Ok(());
            }
            match self.check(&job.reference) {
                Ok(Some((file, directory))) => {
                    job.directory = Some(directory);
                    self.hash(job, file, tick)?;
                }
                Ok(None) => {}
                Err(Located { problem, directory }) => {
                    job.directory = directory;
                    self.shared.fail(job, problem)?;
                }
            }
            tick(self.shared)?;
        }
        Ok(())
    }

    /// Checks an object without its content. If the content must be checked too, returns the file and the
    /// index of its directory.
    fn check(&mut self, reference: &Reference) -> Result<Option<(OwnedFd, usize)>, Located> {
        let Check { store, check, verity, .. } = self.shared.check;
        let object = reference
            .object
            .as_ref()
            .ok_or(Located { problem: ObjectProblem::InvalidReference, directory: None })?;
        let found = store.find(object)?;
        let located = |problem| Located { problem, directory: Some(found.index) };
        if found.size != reference.size {
            return Err(located(ObjectProblem::WrongSize { found: found.size }));
        }
        let Some(expected) = reference.digest else {
            self.totals.without_digest += 1;
            self.unverified(VerityUnavailable::NoDigest).map_err(located)?;
            return Ok(None);
        };
        let is_read = *check == ObjectCheck::Content;
        if *verity == VerityNeed::None && !is_read {
            return Ok(None);
        }
        let file = found.open().map_err(located)?;
        if *verity != VerityNeed::None {
            self.measure(&file, expected).map_err(located)?;
        }
        Ok(is_read.then_some((file, found.index)))
    }

    /// Measures an object, and compares the measurement with the digest in the image.
    fn measure(&mut self, file: &OwnedFd, expected: Digest) -> Result<(), ObjectProblem> {
        let failed = |errno| {
            ObjectProblem::Unreadable(Box::new(KernelError::new(Operation::MeasureVerity, errno)))
        };
        match measure(file).map_err(failed)? {
            VerityStatus::Digest(found) if found != expected => {
                Err(ObjectProblem::WrongVerityDigest { found })
            }
            status => match status.digest(expected.algorithm()) {
                Ok(_) => Ok(()),
                Err(reason) => self.unverified(reason),
            },
        }
    }

    /// Notes that the kernel cannot verify an object.
    fn unverified(&mut self, reason: VerityUnavailable) -> Result<(), ObjectProblem> {
        match (self.shared.check.verity, reason) {
            (VerityNeed::None, _) => {}
            (VerityNeed::IfAvailable, _) => {
                self.totals.unverified = worse(self.totals.unverified, Some(reason));
            }
            (VerityNeed::Required, VerityUnavailable::NoDigest) => {
                return Err(ObjectProblem::NoDigest);
            }
            (VerityNeed::Required, _) => return Err(ObjectProblem::VerityUnavailable(reason)),
        }
        Ok(())
    }

    /// Hashes the content of an object: at once, with other small files, or later on all CPUs.
    fn hash(&mut self, job: Job, file: OwnedFd, tick: Tick) -> Result<(), ObjectsError> {
        let (size, Some(expected)) = (job.reference.size, job.reference.digest) else {
            return Ok(());
        };
        let algorithm = expected.algorithm();
        self.shared.bytes.found.fetch_add(size, Ordering::Relaxed);
        if size > LARGE {
            self.shared.large_left.fetch_add(1, Ordering::Relaxed);
            lock(&self.shared.large).push(job);
            return Ok(());
        }
        let is_small = size <= Batch::<Job>::FILE_MAX as u64;
        if !is_small || self.batch.as_ref().is_some_and(|batch| !batch.has_room(algorithm, size)) {
            self.flush()?;
        }
        let Some(batch) = &mut self.batch else { return Ok(()) };
        if !is_small {
            let tree = MerkleTree::new(algorithm, size);
            let mut on_piece = |length| {
                self.shared.bytes.done.fetch_add(length, Ordering::Relaxed);
                tick(self.shared)
            };
            let found = hash_spans(tree, &file, batch.whole_buffer(), &mut on_piece);
            return match found? {
                Ok(found) => self.shared.compare(job, found),
                Err(problem) => self.shared.fail(job, problem),
            };
        }
        let read = read_exactly(&file, batch.buffer(size), 0);
        self.shared.bytes.done.fetch_add(size, Ordering::Relaxed);
        match read {
            Ok(()) => batch.push(job, algorithm, size),
            Err(problem) => return self.shared.fail(job, problem),
        }
        Ok(())
    }

    /// Hashes the files of the batch.
    fn flush(&mut self) -> Result<(), ObjectsError> {
        let (shared, mut result) = (self.shared, Ok(()));
        if let Some(batch) = &mut self.batch {
            batch.finish(|job, found| {
                let compared = shared.compare(job, found);
                result = std::mem::replace(&mut result, Ok(())).and(compared);
            });
        }
        result
    }
}

/// Hashes a file of several spans in this thread.
fn hash_spans(
    tree: MerkleTree,
    file: &OwnedFd,
    buffer: &mut [u8],
    on_piece: &mut dyn FnMut(u64) -> Result<(), ObjectsError>,
) -> Result<Result<Digest, ObjectProblem>, ObjectsError> {
    let mut hashes = Vec::new();
    let mut number = 0;
    while let Some(span) = tree.span(number) {
        let mut hasher = tree.span_hasher();
        let mut offset = span.start;
        while offset < span.end {
            let length = buffer.len().min((span.end - offset) as usize);
            let piece = &mut buffer[..length];
            if let Err(problem) = read_exactly(file, piece, offset) {
                return Ok(Err(problem));
            }
            hasher.update(piece);
            offset += length as u64;
            on_piece(length as u64)?;
        }
        hashes.push(hasher.finish());
        number += 1;
    }
    Ok(Ok(tree.digest(hashes)))
}

fn read_exactly(file: &OwnedFd, buffer: &mut [u8], offset: u64) -> Result<(), ObjectProblem> {
    match read_at(file, buffer, offset).map_err(unreadable)? {
        length if length == buffer.len() => Ok(()),
        _ => Err(ObjectProblem::Changed),
    }
}

/// Returns the reason that is harder to remove from a system.
fn worse(
    one: Option<VerityUnavailable>,
    other: Option<VerityUnavailable>,
) -> Option<VerityUnavailable> {
    let rank = |reason: &VerityUnavailable| match reason {
        VerityUnavailable::NotEnabled => 0,
        VerityUnavailable::OtherAlgorithm(_) => 1,
        VerityUnavailable::NoDigest => 2,
        VerityUnavailable::Unsupported => 3,
    };
    one.into_iter().chain(other).max_by_key(rank)
}
