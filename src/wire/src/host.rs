//! Requests and responses between the daemon and the module host.
//!
//! One message is one packet of a `SOCK_SEQPACKET` socketpair: the kernel keeps the boundaries, so
//! many session threads may receive on one descriptor and each gets a whole request. Integers are
//! big-endian.
//!
//! ```text
//! offset  size  field
//!      0     1  protocol version, 1
//!      1     1  kind (a response carries its request's kind with the high bit set)
//!      2     2  reserved, 0
//!      4     8  request id, chosen by the daemon, echoed by the host
//!     12     –  body
//! ```
//!
//! The first request is [`Request::Open`]; after it many requests may be in flight and are answered
//! in any order. A peer that sends anything malformed is not argued with: the daemon kills the host,
//! the host exits.

mod codec;

use crate::envelope::{MAX_KEY_ID_LEN, Wrap};
use crate::fault::Fault;
use crate::identity::Fingerprint;
use crate::secret::Secret;

/// Protocol version in every message.
pub const VERSION: u8 = 1;
/// Longest message in bytes; also the size of a receive buffer.
pub const MAX_MESSAGE_LEN: usize = 64 * 1024;
/// Longest PIN. Vendors' user:password forms stay far below.
pub const MAX_PIN_LEN: usize = 1024;
/// Longest CKA_ID or CKA_LABEL that names a key.
pub const MAX_NAME_LEN: usize = 255;
/// Most keys a token description lists. A usual one takes about 100 bytes, on a poor token with the
/// reasons why it wraps as it does 600; names and reasons of all of them at their limit would not fit
/// into [`MAX_MESSAGE_LEN`], so their bytes have a limit as well.
pub const MAX_KEYS: usize = 96;
/// Most wraps that a key was found unable to do: there are no more that are better than another.
pub const MAX_PASSED_OVER: usize = 5;
/// Longest reason why a wrap was passed over.
pub const MAX_REASON_LEN: usize = 120;
/// Longest AAD: envelope header and key_id.
pub const MAX_AAD_LEN: usize = 64 + MAX_KEY_ID_LEN;

/// Most notes on refused PINs in an Open; who has more must not log in.
pub const MAX_LATCH_NOTES: usize = 64;

/// Where a key is found, and which key it must be once found.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct KeyRef {
    /// CKA_ID.
    pub id: Vec<u8>,
    /// CKA_LABEL.
    pub label: String,
    /// The host refuses a key with another fingerprint.
    pub fingerprint: Fingerprint,
}

/// A PIN of this generation was refused by the token with this serial number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LatchNote {
    /// Serial number of the token, without padding.
    pub serial: String,
    /// `pin.generation` that was refused; it and every lower one stay refused.
    pub generation: u32,
}

/// What to load and how to log in.
#[derive(Debug, PartialEq, Eq)]
pub struct Open {
    /// Absolute path of the vendor's module.
    pub module: String,
    /// PKCS#11 URI of the token.
    pub token: String,
    /// Session threads, 1 to 64.
    pub sessions: u16,
    /// The user PIN; without one the token is used as it is, without login.
    pub pin: Option<Secret>,
    /// `pin.generation` of the configuration.
    pub pin_generation: u32,
    /// What was noted before.
    pub latched: Vec<LatchNote>,
}

/// What the daemon asks.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// Load the module, find the token, log in. First and once.
    Open(Open),
    /// Token, keys and how each key can wrap.
    Describe,
    /// Wrap `plaintext` under `key`, bound to `aad`.
    Seal {
        /// Under which key.
        key: KeyRef,
        /// How.
        wrap: Wrap,
        /// Authenticated with it.
        aad: Vec<u8>,
        /// At most [`MAX_PLAINTEXT_LEN`] bytes.
        plaintext: Secret,
    },
    /// Undo [`Request::Seal`].
    Unseal {
        /// Under which key.
        key: KeyRef,
        /// How it was sealed.
        wrap: Wrap,
        /// As at sealing.
        aad: Vec<u8>,
        /// The sealed part of the envelope.
        sealed: Vec<u8>,
        /// Length the plaintext must have.
        plaintext_len: u32,
    },
    /// Seal and unseal fresh random bytes, and compare.
    Probe {
        /// Under which key.
        key: KeyRef,
        /// How.
        wrap: Wrap,
    },
}

/// What PKCS#11 says of a token (`CK_TOKEN_INFO`, padding removed).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenInfo {
    /// label
    pub label: String,
    /// serialNumber
    pub serial: String,
    /// manufacturerID
    pub manufacturer: String,
    /// model
    pub model: String,
}

/// What kind of key it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum KeyClass {
    /// CKO_SECRET_KEY, for AES.
    Secret = 0,
    /// CKO_PRIVATE_KEY, for RSA.
    Private = 1,
}

/// A wrap that would have been better, and why the key cannot be used so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedOver {
    /// Which.
    pub wrap: Wrap,
    /// What it failed in, at most [`MAX_REASON_LEN`] bytes.
    pub reason: String,
}

/// A key on the token that may wrap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyInfo {
    /// How to ask for it.
    pub key: KeyRef,
    /// Of what kind.
    pub class: KeyClass,
    /// Length in bits.
    pub bits: u16,
    /// CKA_SENSITIVE.
    pub sensitive: bool,
    /// CKA_EXTRACTABLE.
    pub extractable: bool,
    /// CKA_NEVER_EXTRACTABLE.
    pub never_extractable: bool,
    /// The wrap that passed the host's self-test, else why none did.
    pub wrap: Result<Wrap, String>,
    /// Better wraps that did not, best first, at most [`MAX_PASSED_OVER`].
    pub passed_over: Vec<PassedOver>,
}

/// A token as the host found it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Description {
    /// The token.
    pub token: TokenInfo,
    /// AES and RSA keys that could be fingerprinted, at most [`MAX_KEYS`].
    pub keys: Vec<KeyInfo>,
    /// Keys left out: over the limit, of another type, or not to be fingerprinted.
    pub omitted: u16,
}

/// What the host answers when it worked.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Module loaded, token found, logged in.
    Opened(TokenInfo),
    /// The answer to Describe.
    Described(Description),
    /// Nonce, ciphertext and tag as the wrap lays them out.
    Sealed(Vec<u8>),
    /// The plaintext.
    Unsealed(Secret),
    /// The round trip worked.
    Probed,
}

/// Steps of the recovery ladder that the host took before it answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Recovery {
    /// Tried again on a new session.
    pub retried: bool,
    /// Logged in again.
    pub relogin: bool,
    /// `C_Finalize` and `C_Initialize`.
    pub reinit: bool,
}

/// A response: what it took, and what came of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Response {
    /// Id of the request.
    pub id: u64,
    /// Steps taken.
    pub recovery: Recovery,
    /// The answer, or the fault that no step in the host could mend.
    pub outcome: Result<Answer, Fault>,
}
