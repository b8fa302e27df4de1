//! The bytes of the messages: each has its limits, and what is over one is refused by who reads it.

use zeroize::Zeroizing;

use super::*;
use crate::cursor::{MalformedError, Reader, Writer};
use crate::envelope::{MAX_LEN, MAX_PLAINTEXT_LEN};
use crate::fault::{FaultKind, MAX_DETAIL_LEN};

const MAX_PATH_LEN: usize = 4096;
const MAX_URI_LEN: usize = 2048;
/// What is left of a message when head, recovery steps, counts and a token of four names at their
/// limit (1045 bytes) are taken off.
const MAX_KEYS_LEN: usize = MAX_MESSAGE_LEN - 2048;
const HIGH_BIT: u8 = 0x80;

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
