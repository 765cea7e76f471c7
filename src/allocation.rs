//! Memory of the process itself, where a lack of it is to be an error: what asks for memory in the usual
//! way is aborted.

use std::hint::black_box;

use rustix::io::Errno;

/// Several times what hashing needs, without optimization too.
pub(crate) const STACK_SIZE: usize = 128 * 1024;

/// What a thread takes: its stack, the one it gets for signals, the heap that the C library gives it.
/// The standard library panics where the second cannot be had.
const THREAD: usize = STACK_SIZE + 192 * 1024;

/// What is left for all that asks in the usual way: the standard library, and what decoders need
/// besides their window.
const ROOM: usize = 512 * 1024;

/// A compiler that sees that nothing is done with it leaves out the question for memory; hence
/// [`black_box`] below.
fn vec_of<T>(count: usize) -> Result<Vec<T>, Errno> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(count).map_err(|_| Errno::NOMEM)?;
    Ok(vec)
}

/// So many of this value.
pub(crate) fn filled<T: Clone>(count: usize, value: T) -> Result<Vec<T>, Errno> {
    let mut vec = vec_of(count)?;
    vec.resize(count, value);
    Ok(vec)
}

/// As many buffers as can be had, at most `count`.
pub(crate) fn buffers(count: usize, size: usize) -> Vec<Vec<u8>> {
    let Ok(_room) = vec_of::<u8>(ROOM).map(black_box) else { return Vec::new() };
    let mut buffers = vec_of(count).unwrap_or_default();
    buffers.extend((0..buffers.capacity()).map_while(|_| filled(size, 0).ok()));
    buffers
}

/// For how many of `wanted` threads there is memory; an error where it is too little even for what
/// this one has to do.
pub(crate) fn room_for_threads(wanted: usize) -> Result<usize, Errno> {
    // Taken and given back at once.
    let is_there = |size| vec_of::<u8>(size).map(black_box).is_ok();
    (0..=wanted).rev().find(|threads| is_there(ROOM + threads * THREAD)).ok_or(Errno::NOMEM)
}
