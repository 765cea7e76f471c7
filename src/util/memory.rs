//! Memory of the process itself, allocated so that a shortage is an error. Ordinary allocations abort the
//! process.

use std::hint::black_box;

use rustix::io::Errno;

/// The stack of a thread, in bytes: several times the need of hashing, even without optimization.
pub(crate) const STACK_SIZE: usize = 128 * 1024;

/// The memory of a thread, in bytes: its stack, its signal stack, and the heap that the C library gives it.
/// The standard library panics if the signal stack cannot be allocated.
const THREAD_SIZE: usize = STACK_SIZE + 192 * 1024;

/// Memory, in bytes, that is left for allocations that abort on failure: the standard library makes some, and
/// decoders make some beside their window.
const HEADROOM: usize = 512 * 1024;

/// Allocates an empty vector for `count` elements. If the vector is not used, the compiler removes the
/// allocation. [`black_box`] prevents this.
fn vec_of<T>(count: usize) -> Result<Vec<T>, Errno> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(count).map_err(|_| Errno::NOMEM)?;
    Ok(vec)
}

/// Returns `count` copies of a value.
pub(crate) fn try_filled<T: Clone>(count: usize, value: T) -> Result<Vec<T>, Errno> {
    let mut vec = vec_of(count)?;
    vec.resize(count, value);
    Ok(vec)
}

/// Returns as many buffers as memory allows, at most `count`.
pub(crate) fn try_buffers(count: usize, size: usize) -> Vec<Vec<u8>> {
    let Ok(_headroom) = vec_of::<u8>(HEADROOM).map(black_box) else { return Vec::new() };
    let mut buffers = vec_of(count).unwrap_or_default();
    buffers.extend((0..buffers.capacity()).map_while(|_| try_filled(size, 0).ok()));
    buffers
}

/// Returns the number of threads, at most `wanted`, for which there is memory. Fails if there is too little
/// memory for the calling thread alone.
pub(crate) fn threads_that_fit(wanted: usize) -> Result<usize, Errno> {
    // The memory is allocated and freed at once.
    let fits = |size| vec_of::<u8>(size).map(black_box).is_ok();
    (0..=wanted).rev().find(|threads| fits(HEADROOM + threads * THREAD_SIZE)).ok_or(Errno::NOMEM)
}
