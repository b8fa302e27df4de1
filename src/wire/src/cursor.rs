//! Bounds-checked reading and writing of little fixed formats.
//!
//! Integers are big-endian, as in every format of this crate. A read past the end is an error, not
//! a panic; a length field is checked against what is really there before anything is allocated.

use thiserror::Error;
use zeroize::Zeroizing;

/// A message ended early, ran on, or holds a length that cannot be.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub enum MalformedError {
    /// Fewer bytes than the field needs.
    #[error("message ends inside {0}")]
    Truncated(&'static str),
    /// Bytes are left after the last field.
    #[error("{0} bytes follow the last field")]
    Trailing(usize),
    /// A field holds a value its type does not have.
    #[error("{0} has a value that does not exist")]
    Value(&'static str),
    /// A length or count is above the field's limit.
    #[error("{0} is over its limit")]
    Limit(&'static str),
}

/// Reads fields off the front of a byte slice.
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Starts at the first byte of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next `n` bytes.
    pub fn take(&mut self, n: usize, field: &'static str) -> Result<&'a [u8], MalformedError> {
        let (head, rest) = self
            .0
            .split_at_checked(n)
            .ok_or(MalformedError::Truncated(field))?;
        self.0 = rest;
        Ok(head)
    }

    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<[u8; N], MalformedError> {
        let (head, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or(MalformedError::Truncated(field))?;
        self.0 = rest;
        Ok(*head)
    }

    /// One byte.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, MalformedError> {
        Ok(self.array::<1>(field)?[0])
    }

    /// A `u16`.
    pub fn u16(&mut self, field: &'static str) -> Result<u16, MalformedError> {
        Ok(u16::from_be_bytes(self.array(field)?))
    }

    /// A `u32`.
    pub fn u32(&mut self, field: &'static str) -> Result<u32, MalformedError> {
        Ok(u32::from_be_bytes(self.array(field)?))
    }

    /// A `u64`.
    pub fn u64(&mut self, field: &'static str) -> Result<u64, MalformedError> {
        Ok(u64::from_be_bytes(self.array(field)?))
    }

    /// A byte string: `u16` length, then the bytes; longer than `limit` is refused.
    pub fn bytes(&mut self, limit: usize, field: &'static str) -> Result<&'a [u8], MalformedError> {
        let n = usize::from(self.u16(field)?);
        if n > limit {
            return Err(MalformedError::Limit(field));
        }
        self.take(n, field)
    }

    /// A UTF-8 string in the form of [`Self::bytes`].
    pub fn text(&mut self, limit: usize, field: &'static str) -> Result<String, MalformedError> {
        String::from_utf8(self.bytes(limit, field)?.to_vec())
            .map_err(|_| MalformedError::Value(field))
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// Ok when nothing is left.
    pub fn finish(self) -> Result<(), MalformedError> {
        match self.0.len() {
            0 => Ok(()),
            n => Err(MalformedError::Trailing(n)),
        }
    }
}

/// Appends fields to a buffer that is wiped on drop: a message may carry a PIN or a plaintext.
#[derive(Default)]
pub struct Writer(Zeroizing<Vec<u8>>);

impl Writer {
    /// An empty message with room for `capacity` bytes, so that a secret is not left behind by a
    /// reallocation.
    pub fn with_capacity(capacity: usize) -> Self {
        Self(Zeroizing::new(Vec::with_capacity(capacity)))
    }

    /// Raw bytes.
    pub fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// One byte.
    pub fn u8(&mut self, v: u8) -> &mut Self {
        self.put(&[v])
    }

    /// A `u16`.
    pub fn u16(&mut self, v: u16) -> &mut Self {
        self.put(&v.to_be_bytes())
    }

    /// A `u32`.
    pub fn u32(&mut self, v: u32) -> &mut Self {
        self.put(&v.to_be_bytes())
    }

    /// A `u64`.
    pub fn u64(&mut self, v: u64) -> &mut Self {
        self.put(&v.to_be_bytes())
    }

    /// A byte string: `u16` length, then the bytes. What does not fit is cut at 65 535 bytes;
    /// callers keep far below that by the limits of [`crate::host`].
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        let n = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        self.u16(n).put(&bytes[..usize::from(n)])
    }

    /// The finished message.
    pub fn finish(self) -> Zeroizing<Vec<u8>> {
        self.0
    }
}
