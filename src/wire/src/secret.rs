//! Bytes that are wiped when dropped and never printed: PINs, plaintext seeds, frames that carry
//! either.
//!
//! [`Secret`] is deliberately neither `Clone` nor `Serialize`, and its `Debug` shows only a length:
//! a copy that nobody wipes, or a log line, is how a key leaks.

use std::fmt;

use zeroize::Zeroizing;

/// Owned secret bytes. Wiped on drop, including spare capacity.
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Takes ownership of `bytes`; the caller keeps no copy.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Copies `bytes` into a buffer that is wiped on drop. The source stays the caller's to wipe.
    pub fn copy_of(bytes: &[u8]) -> Self {
        Self::new(bytes.to_vec())
    }

    /// The bytes themselves. Borrow for as short a time as possible.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True when there are no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({} bytes)", self.0.len())
    }
}

/// Not constant-time: for tests and self-tests, never for comparing a guess with a secret.
impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Eq for Secret {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_only_the_length() {
        let text = format!("{:?}", Secret::copy_of(b"1234-canary"));
        assert_eq!(text, "Secret(11 bytes)");
    }
}
