//! The PIN, for as long as the host lives: one locked page of its own.
//!
//! The page is never swapped, left out of core dumps, empty in any child that the module forks, and
//! wiped on drop. It is kept because a token may forget the login at any time, and the daemon, which
//! could read the PIN again, keeps none.

use std::num::NonZero;
use std::ptr::NonNull;

use hsm_wire::host::MAX_PIN_LEN;
use nix::sys::mman::{
    MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap_anonymous, munlock, munmap,
};
use zeroize::Zeroize;

/// Mapping, locking and advising round it up to whole pages.
const SIZE: NonZero<usize> = NonZero::new(4096).expect("not zero");
const _: () = assert!(MAX_PIN_LEN <= SIZE.get());

/// A PIN in locked memory.
pub(crate) struct LockedPin {
    page: NonNull<u8>,
    len: usize,
}

// SAFETY: the page belongs to this value alone and is reached only through `&self` and `&mut self`.
unsafe impl Send for LockedPin {}

impl LockedPin {
    /// Copies `pin`; the source stays the caller's to wipe. At most [`MAX_PIN_LEN`] bytes, which
    /// reading the request has ensured; what is beyond is cut.
    ///
    /// A limit on locked memory (RLIMIT_MEMLOCK) is told in the log and does not stop us: without
    /// the lock the page may be swapped, without the PIN there is no token.
    pub(crate) fn new(pin: &[u8]) -> nix::Result<Self> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private mapping, at an address that the kernel chooses.
        let mapping = unsafe { mmap_anonymous(None, SIZE, protection, MapFlags::MAP_PRIVATE) }?;
        let len = pin.len().min(MAX_PIN_LEN);
        let mut this = Self {
            page: mapping.cast(),
            len,
        };
        // SAFETY: the range is the mapping made above.
        if let Err(error) = unsafe { mlock(mapping, SIZE.get()) } {
            log!(
                "the PIN's memory cannot be locked ({error}) and could be swapped; \
                 raise RLIMIT_MEMLOCK"
            );
        }
        for advice in [MmapAdvise::MADV_DONTDUMP, MmapAdvise::MADV_WIPEONFORK] {
            // SAFETY: the range is the mapping made above; neither advice changes what we read.
            unsafe { madvise(mapping, SIZE.get(), advice) }?;
        }
        this.bytes_mut().copy_from_slice(&pin[..len]);
        Ok(this)
    }

    /// The PIN itself.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping lives until drop, is larger than `len`, initialised (anonymous memory
        // is zero), and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.page.as_ptr(), self.len) }
    }
}

impl Drop for LockedPin {
    fn drop(&mut self) {
        self.bytes_mut().zeroize();
        let mapping = self.page.cast();
        // SAFETY: the mapping made in `new`, of this size, and nothing refers to it any more.
        // Failure would mean that it is not mapped.
        unsafe {
            let _ = munlock(mapping, SIZE.get());
            let _ = munmap(mapping, SIZE.get());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pin_is_kept_as_given() {
        let mut pin = LockedPin::new(b"crypto-user:1234").expect("mmap");
        assert_eq!(pin.bytes_mut(), b"crypto-user:1234");
    }
}
