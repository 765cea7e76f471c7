//! The pages of the kernel: 4096, 16,384 or 65,536 bytes.

use sealmount_sys::page_size;

/// Rounds a size up to whole pages, in bytes.
pub(crate) fn whole_pages(size: u64) -> u64 {
    round_up(size, page_size() as u64)
}

/// Returns whether a file of this size ends within a page.
pub(crate) fn ends_within_page(size: u64) -> bool {
    !size.is_multiple_of(page_size() as u64)
}

fn round_up(size: u64, page: u64) -> u64 {
    size.checked_next_multiple_of(page).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up_to_pages() {
        for page in [4096, 16_384, 65_536] {
            for (size, expected) in [
                (0, 0),
                (1, page),
                (page - 1, page),
                (page, page),
                (page + 1, 2 * page),
                (u64::MAX - page, u64::MAX - page + 1),
                (u64::MAX - page + 2, u64::MAX),
                (u64::MAX, u64::MAX),
            ] {
                assert_eq!(round_up(size, page), expected, "{size} bytes, pages of {page} bytes");
            }
        }
    }

    #[test]
    fn file_of_whole_pages_ends_with_a_page() {
        for size in [0, 1, 4096, 24_576, 1 << 16, (1 << 16) + 1] {
            assert_eq!(ends_within_page(size), whole_pages(size) != size, "{size} bytes");
        }
    }
}
