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

use zeroize::Zeroizing;

use crate::cursor::{MalformedError, Reader, Writer};
use crate::envelope::{MAX_KEY_ID_LEN, MAX_LEN, MAX_PLAINTEXT_LEN, Wrap};
use crate::fault::{Fault, FaultKind, MAX_DETAIL_LEN};
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

const MAX_PATH_LEN: usize = 4096;
const MAX_URI_LEN: usize = 2048;
/// Most notes on refused PINs in an Open; who has more must not log in.
pub const MAX_LATCH_NOTES: usize = 64;
/// What is left of a message when head, recovery steps, counts and a token of four names at their
/// limit (1045 bytes) are taken off.
const MAX_KEYS_LEN: usize = MAX_MESSAGE_LEN - 2048;
const HIGH_BIT: u8 = 0x80;

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

impl Request {
    fn kind(&self) -> u8 {
        match self {
            Self::Open(_) => 1,
            Self::Describe => 2,
            Self::Seal { .. } => 3,
            Self::Unseal { .. } => 4,
            Self::Probe { .. } => 5,
        }
    }

    /// The packet. It is wiped on drop: it may carry a PIN or a plaintext.
    pub fn encode(&self, id: u64) -> Zeroizing<Vec<u8>> {
        let mut w = Writer::with_capacity(self.capacity());
        put_head(&mut w, self.kind(), id);
        match self {
            Self::Open(open) => put_open(&mut w, open),
            Self::Describe => {}
            Self::Seal {
                key,
                wrap,
                aad,
                plaintext,
            } => {
                put_key(&mut w, key);
                w.put(&wrap.to_bytes()).bytes(aad).bytes(plaintext.expose());
            }
            Self::Unseal {
                key,
                wrap,
                aad,
                sealed,
                plaintext_len,
            } => {
                put_key(&mut w, key);
                w.put(&wrap.to_bytes())
                    .bytes(aad)
                    .bytes(sealed)
                    .u32(*plaintext_len);
            }
            Self::Probe { key, wrap } => {
                put_key(&mut w, key);
                w.put(&wrap.to_bytes());
            }
        }
        w.finish()
    }

    // Large enough that no message with a secret ever grows, which would leave a copy behind.
    fn capacity(&self) -> usize {
        match self {
            Self::Open(open) => {
                256 + open.module.len()
                    + open.token.len()
                    + MAX_PIN_LEN
                    + open
                        .latched
                        .iter()
                        .map(|n| n.serial.len() + 8)
                        .sum::<usize>()
            }
            _ => 128 + 2 * MAX_NAME_LEN + MAX_AAD_LEN + MAX_LEN,
        }
    }

    /// Reads a packet: request id and request.
    pub fn decode(packet: &[u8]) -> Result<(u64, Self), MalformedError> {
        let mut r = Reader::new(packet);
        let (kind, id) = read_head(&mut r)?;
        let request = match kind {
            1 => Self::Open(read_open(&mut r)?),
            2 => Self::Describe,
            3 => Self::Seal {
                key: read_key(&mut r)?,
                wrap: Wrap::from_bytes(r.array("wrap")?)?,
                aad: r.bytes(MAX_AAD_LEN, "AAD")?.to_vec(),
                plaintext: Secret::copy_of(r.bytes(MAX_PLAINTEXT_LEN, "plaintext")?),
            },
            4 => Self::Unseal {
                key: read_key(&mut r)?,
                wrap: Wrap::from_bytes(r.array("wrap")?)?,
                aad: r.bytes(MAX_AAD_LEN, "AAD")?.to_vec(),
                sealed: r.bytes(MAX_LEN, "sealed part")?.to_vec(),
                plaintext_len: r.u32("plaintext length")?,
            },
            5 => Self::Probe {
                key: read_key(&mut r)?,
                wrap: Wrap::from_bytes(r.array("wrap")?)?,
            },
            _ => return Err(MalformedError::Value("request kind")),
        };
        r.finish()?;
        Ok((id, request))
    }
}

impl Response {
    /// The packet for a request of `kind`. It is wiped on drop: it may carry a plaintext.
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut w = Writer::with_capacity(match &self.outcome {
            Ok(Answer::Described(d)) => 1024 + d.keys.len() * 512,
            _ => 2048 + MAX_DETAIL_LEN,
        });
        let kind = match &self.outcome {
            Ok(Answer::Opened(_)) => 1,
            Ok(Answer::Described(_)) => 2,
            Ok(Answer::Sealed(_)) => 3,
            Ok(Answer::Unsealed(_)) => 4,
            Ok(Answer::Probed) => 5,
            Err(_) => 0x7f,
        };
        put_head(&mut w, kind | HIGH_BIT, self.id);
        let Recovery {
            retried,
            relogin,
            reinit,
        } = self.recovery;
        w.u8(u8::from(retried) | u8::from(relogin) << 1 | u8::from(reinit) << 2);
        match &self.outcome {
            Ok(Answer::Opened(token)) => put_token(&mut w, token),
            Ok(Answer::Described(description)) => put_description(&mut w, description),
            Ok(Answer::Sealed(sealed)) => {
                w.bytes(sealed);
            }
            Ok(Answer::Unsealed(plaintext)) => {
                w.bytes(plaintext.expose());
            }
            Ok(Answer::Probed) => {}
            Err(fault) => {
                w.u8(fault.kind as u8)
                    .u64(fault.ckr)
                    .bytes(cut(&fault.function, MAX_DETAIL_LEN).as_bytes())
                    .bytes(cut(&fault.detail, MAX_DETAIL_LEN).as_bytes())
                    .bytes(cut(&fault.serial, MAX_NAME_LEN).as_bytes());
            }
        }
        w.finish()
    }

    /// Reads a packet. The host runs a vendor's code: nothing in it is believed but its form.
    pub fn decode(packet: &[u8]) -> Result<Self, MalformedError> {
        let mut r = Reader::new(packet);
        let (kind, id) = read_head(&mut r)?;
        let bits = r.u8("recovery steps")?;
        if bits > 7 {
            return Err(MalformedError::Value("recovery steps"));
        }
        let recovery = Recovery {
            retried: bits & 1 != 0,
            relogin: bits & 2 != 0,
            reinit: bits & 4 != 0,
        };
        let outcome = match kind ^ HIGH_BIT {
            1 => Ok(Answer::Opened(read_token(&mut r)?)),
            2 => Ok(Answer::Described(read_description(&mut r)?)),
            3 => Ok(Answer::Sealed(r.bytes(MAX_LEN, "sealed part")?.to_vec())),
            4 => Ok(Answer::Unsealed(Secret::copy_of(
                r.bytes(MAX_PLAINTEXT_LEN, "plaintext")?,
            ))),
            5 => Ok(Answer::Probed),
            0x7f => Err(Fault {
                kind: FaultKind::from_u8(r.u8("fault kind")?)
                    .ok_or(MalformedError::Value("fault kind"))?,
                ckr: r.u64("CKR value")?,
                function: r.text(MAX_DETAIL_LEN, "function")?,
                detail: r.text(MAX_DETAIL_LEN, "detail")?,
                serial: r.text(MAX_NAME_LEN, "serial number")?,
            }),
            _ => return Err(MalformedError::Value("response kind")),
        };
        r.finish()?;
        Ok(Self {
            id,
            recovery,
            outcome,
        })
    }
}

fn put_head(w: &mut Writer, kind: u8, id: u64) {
    w.u8(VERSION).u8(kind).u16(0).u64(id);
}

fn read_head(r: &mut Reader<'_>) -> Result<(u8, u64), MalformedError> {
    if r.u8("version")? != VERSION {
        return Err(MalformedError::Value("version"));
    }
    let kind = r.u8("kind")?;
    if r.u16("reserved bytes")? != 0 {
        return Err(MalformedError::Value("reserved bytes"));
    }
    Ok((kind, r.u64("request id")?))
}

fn put_open(w: &mut Writer, open: &Open) {
    w.bytes(open.module.as_bytes())
        .bytes(open.token.as_bytes())
        .u16(open.sessions)
        .u32(open.pin_generation);
    match &open.pin {
        Some(pin) => w.u8(1).bytes(pin.expose()),
        None => w.u8(0),
    };
    let notes = &open.latched[..open.latched.len().min(MAX_LATCH_NOTES)];
    w.u16(notes.len() as u16);
    for note in notes {
        w.bytes(note.serial.as_bytes()).u32(note.generation);
    }
}

fn read_open(r: &mut Reader<'_>) -> Result<Open, MalformedError> {
    let module = r.text(MAX_PATH_LEN, "module")?;
    let token = r.text(MAX_URI_LEN, "token URI")?;
    let sessions = r.u16("sessions")?;
    let pin_generation = r.u32("PIN generation")?;
    let pin = match r.u8("PIN marker")? {
        0 => None,
        1 => Some(Secret::copy_of(r.bytes(MAX_PIN_LEN, "PIN")?)),
        _ => return Err(MalformedError::Value("PIN marker")),
    };
    let count = usize::from(r.u16("latch notes")?);
    if count > MAX_LATCH_NOTES {
        return Err(MalformedError::Limit("latch notes"));
    }
    let latched = (0..count)
        .map(|_| {
            Ok(LatchNote {
                serial: r.text(MAX_NAME_LEN, "serial number")?,
                generation: r.u32("latched generation")?,
            })
        })
        .collect::<Result<_, MalformedError>>()?;
    Ok(Open {
        module,
        token,
        sessions,
        pin,
        pin_generation,
        latched,
    })
}

fn put_key(w: &mut Writer, key: &KeyRef) {
    w.bytes(&key.id)
        .bytes(key.label.as_bytes())
        .put(&key.fingerprint.0);
}

fn read_key(r: &mut Reader<'_>) -> Result<KeyRef, MalformedError> {
    Ok(KeyRef {
        id: r.bytes(MAX_NAME_LEN, "key id")?.to_vec(),
        label: r.text(MAX_NAME_LEN, "key label")?,
        fingerprint: Fingerprint(r.array("fingerprint")?),
    })
}

fn put_token(w: &mut Writer, token: &TokenInfo) {
    for text in [
        &token.label,
        &token.serial,
        &token.manufacturer,
        &token.model,
    ] {
        w.bytes(cut(text, MAX_NAME_LEN).as_bytes());
    }
}

fn read_token(r: &mut Reader<'_>) -> Result<TokenInfo, MalformedError> {
    Ok(TokenInfo {
        label: r.text(MAX_NAME_LEN, "token label")?,
        serial: r.text(MAX_NAME_LEN, "serial number")?,
        manufacturer: r.text(MAX_NAME_LEN, "manufacturer")?,
        model: r.text(MAX_NAME_LEN, "model")?,
    })
}

/// Whatever a token holds, the daemon must be able to read the answer: a key that would break a
/// limit is left out and counted.
fn put_description(w: &mut Writer, description: &Description) {
    let mut keys: Vec<u8> = Vec::new();
    let mut count: u16 = 0;
    for info in &description.keys {
        let key = encode_key_info(info);
        let named = info.key.id.len().max(info.key.label.len()) <= MAX_NAME_LEN;
        if named && usize::from(count) < MAX_KEYS && keys.len() + key.len() <= MAX_KEYS_LEN {
            keys.extend_from_slice(&key);
            count += 1;
        }
    }
    let left_out = description.keys.len() - usize::from(count);
    let omitted = usize::from(description.omitted) + left_out;
    put_token(w, &description.token);
    w.u16(u16::try_from(omitted).unwrap_or(u16::MAX))
        .u16(count)
        .put(&keys);
}

fn encode_key_info(info: &KeyInfo) -> Zeroizing<Vec<u8>> {
    let mut w = Writer::with_capacity(1024);
    put_key(&mut w, &info.key);
    w.u16(info.bits).u8(u8::from(info.sensitive)
        | u8::from(info.extractable) << 1
        | u8::from(info.never_extractable) << 2
        | (info.class as u8) << 3);
    match &info.wrap {
        Ok(wrap) => w.u8(0).put(&wrap.to_bytes()),
        Err(reason) => w.u8(1).bytes(cut(reason, MAX_NAME_LEN).as_bytes()),
    };
    let passed_over = &info.passed_over[..info.passed_over.len().min(MAX_PASSED_OVER)];
    w.u8(passed_over.len() as u8);
    for better in passed_over {
        w.put(&better.wrap.to_bytes())
            .bytes(cut(&better.reason, MAX_REASON_LEN).as_bytes());
    }
    w.finish()
}

fn read_description(r: &mut Reader<'_>) -> Result<Description, MalformedError> {
    let token = read_token(r)?;
    let omitted = r.u16("omitted keys")?;
    let count = usize::from(r.u16("keys")?);
    if count > MAX_KEYS {
        return Err(MalformedError::Limit("keys"));
    }
    let keys = (0..count)
        .map(|_| read_key_info(r))
        .collect::<Result<_, _>>()?;
    Ok(Description {
        token,
        keys,
        omitted,
    })
}

fn read_key_info(r: &mut Reader<'_>) -> Result<KeyInfo, MalformedError> {
    let key = read_key(r)?;
    let bits = r.u16("key length")?;
    let flags = r.u8("key flags")?;
    if flags > 15 {
        return Err(MalformedError::Value("key flags"));
    }
    let wrap = match r.u8("wrap marker")? {
        0 => Ok(Wrap::from_bytes(r.array("wrap")?)?),
        1 => Err(r.text(MAX_NAME_LEN, "reason")?),
        _ => return Err(MalformedError::Value("wrap marker")),
    };
    let count = usize::from(r.u8("wraps passed over")?);
    if count > MAX_PASSED_OVER {
        return Err(MalformedError::Limit("wraps passed over"));
    }
    let passed_over = (0..count)
        .map(|_| {
            Ok(PassedOver {
                wrap: Wrap::from_bytes(r.array("wrap")?)?,
                reason: r.text(MAX_REASON_LEN, "reason")?,
            })
        })
        .collect::<Result<_, MalformedError>>()?;
    Ok(KeyInfo {
        key,
        class: if flags & 8 == 0 {
            KeyClass::Secret
        } else {
            KeyClass::Private
        },
        bits,
        sensitive: flags & 1 != 0,
        extractable: flags & 2 != 0,
        never_extractable: flags & 4 != 0,
        wrap,
        passed_over,
    })
}

/// The longest prefix of `text` that has at most `limit` bytes and ends between characters.
fn cut(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
