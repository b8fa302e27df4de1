//! Bytes from etcd or a clipboard → the envelope in them, and what kube-apiserver keeps beside it.
//!
//! Taken are: the envelope itself; its base64 or hexadecimal digits; what `etcdctl get` prints for an
//! object, with or without the object's name before it; and the same in base64 or hexadecimal. What
//! kube-apiserver stores is `k8s:enc:kms:v2:PROVIDER:` and the protobuf message `EncryptedObject`
//! (k8s.io/apiserver `pkg/storage/value/encrypt/envelope/kmsv2/v2/api.proto`).
//!
//! Whether the envelope is a good one is not asked here.

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use thiserror::Error;

/// etcd takes requests of 1.5 MiB unless told otherwise; this leaves room for more, in hexadecimal.
pub(crate) const MAX_BYTES: usize = 16 * 1024 * 1024;

/// In front of everything that kube-apiserver encrypts.
const ENCRYPTED: &[u8] = b"k8s:enc:";
/// In front of what a KMS v2 plugin had a part in.
const KMS_V2: &[u8] = b"k8s:enc:kms:v2:";
/// What kube-apiserver stores unencrypted begins with one of these: protobuf, and JSON (custom
/// resources).
const PLAIN: [&[u8]; 3] = [b"k8s\0", b"{\"apiVersion\"", b"{\"kind\""];
/// Beginning of an envelope: of any version, so that a later one is named as such.
const MAGIC: &[u8] = &hsm_wire::envelope::MAGIC;

/// What was found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    /// The envelope's bytes.
    pub(crate) envelope: Vec<u8>,
    /// What lies around it in etcd.
    pub(crate) object: Option<Object>,
}

/// An encrypted object in etcd, without its content.
#[derive(Debug, PartialEq, Eq, Default)]
pub(crate) struct Object {
    /// Its key in etcd, if that was printed too.
    pub(crate) name: Option<String>,
    /// Name of the provider in the API server's configuration.
    pub(crate) provider: String,
    /// The `key_id` the plugin gave with the envelope.
    pub(crate) key_id: String,
    /// Bytes of the object itself.
    pub(crate) data_len: usize,
    /// Names of annotations. We write none.
    pub(crate) annotations: Vec<String>,
    /// What the plaintext in the envelope is for: 0 a key, 1 a seed.
    pub(crate) source_type: u64,
}

/// Why there is no envelope to look at.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum NotFound {
    #[error("there is nothing to look at")]
    Nothing,
    #[error(
        "this is {0} bytes that are neither an envelope, nor a value from etcd, nor either of them in base64 or hexadecimal"
    )]
    Unknown(usize),
    #[error("this object is stored in the clear: no provider encrypted it")]
    Plain,
    #[error("this object was encrypted by the provider `{0}`, not by KMS v2")]
    OtherProvider(String),
    #[error("the value ends inside the name of its provider")]
    ProviderCut,
    #[error("what follows `k8s:enc:kms:v2:{provider}:` is not an EncryptedObject: {problem}")]
    NotAnObject {
        provider: String,
        problem: &'static str,
    },
}

/// Looks at the bytes, or at what their text stands for.
pub(crate) fn find(bytes: &[u8]) -> Result<Stored, NotFound> {
    if let Some(stored) = find_raw(bytes) {
        return stored;
    }
    let text: Vec<u8> = bytes
        .iter()
        .copied()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    if text.is_empty() {
        return Err(NotFound::Nothing);
    }
    // An envelope in base64 begins with a letter that is no hexadecimal digit, so the order is safe.
    let decoded = from_hex(&text).or_else(|| from_base64(&text));
    match decoded.as_deref().map(find_raw) {
        Some(Some(stored)) => stored,
        // Something was meant to be an envelope; the caller says what is wrong with it.
        Some(None) if looks_meant(&text) => Ok(Stored {
            envelope: decoded.unwrap_or_default(),
            object: None,
        }),
        _ => Err(NotFound::Unknown(bytes.len())),
    }
}

/// Digits of either kind, and enough of them: a word of a sentence, or a file's name, are neither.
fn looks_meant(text: &[u8]) -> bool {
    text.len() >= 16 && (from_hex(text).is_some() || text.len().is_multiple_of(4))
}

fn find_raw(bytes: &[u8]) -> Option<Result<Stored, NotFound>> {
    if bytes.starts_with(MAGIC) {
        let envelope = bytes.to_vec();
        let object = None;
        return Some(Ok(Stored { envelope, object }));
    }
    let (name, value) = without_name(bytes);
    if PLAIN.iter().any(|plain| value.starts_with(plain)) {
        return Some(Err(NotFound::Plain));
    }
    if let Some(value) = value.strip_prefix(KMS_V2) {
        return Some(object(name, value));
    }
    value.strip_prefix(ENCRYPTED).map(|rest| {
        let mut parts = rest
            .split(|byte| *byte == b':')
            .map(String::from_utf8_lossy);
        let kind = parts.next().unwrap_or_default();
        let version = parts.next().unwrap_or_default();
        let mut provider = format!("{kind} {version}");
        provider.truncate(provider.floor_char_boundary(40));
        Err(NotFound::OtherProvider(provider.escape_debug().to_string()))
    })
}

/// `etcdctl get KEY` prints the key, a line end, the value, a line end.
fn without_name(bytes: &[u8]) -> (Option<String>, &[u8]) {
    let is_name = |line: &[u8]| line.starts_with(b"/") && line.iter().all(u8::is_ascii_graphic);
    match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) if is_name(&bytes[..end]) => (
            Some(String::from_utf8_lossy(&bytes[..end]).into_owned()),
            &bytes[end + 1..],
        ),
        _ => (None, bytes),
    }
}

fn object(name: Option<String>, value: &[u8]) -> Result<Stored, NotFound> {
    let colon = value.iter().position(|byte| *byte == b':');
    let (provider, message) = value.split_at(colon.ok_or(NotFound::ProviderCut)?);
    let provider = String::from_utf8_lossy(provider).escape_debug().to_string();
    let message = &message[1..];
    let read = read(message).or_else(|problem| match message.strip_suffix(b"\n") {
        // etcdctl's line end, which is no field.
        Some(message) => read(message).map_err(|_| problem),
        None => Err(problem),
    });
    match read {
        Ok((object, envelope)) => Ok(Stored {
            envelope,
            object: Some(Object {
                name,
                provider,
                ..object
            }),
        }),
        Err(problem) => Err(NotFound::NotAnObject { provider, problem }),
    }
}

/// Reads an `EncryptedObject`; of its data, only the length.
fn read(mut message: &[u8]) -> Result<(Object, Vec<u8>), &'static str> {
    let mut object = Object::default();
    let mut envelope = Vec::new();
    while !message.is_empty() {
        let (tag, wire_type) = decode_key(&mut message).map_err(|_| "a field has no number")?;
        match (tag, wire_type) {
            (1, WireType::LengthDelimited) => object.data_len = take(&mut message)?.len(),
            (2, WireType::LengthDelimited) => object.key_id = text(take(&mut message)?)?,
            (3, WireType::LengthDelimited) => envelope = take(&mut message)?.to_vec(),
            (4, WireType::LengthDelimited) => {
                object.annotations.push(annotation(take(&mut message)?)?);
            }
            (5, WireType::Varint) => {
                object.source_type =
                    decode_varint(&mut message).map_err(|_| "its last field is cut")?;
            }
            _ => skip_field(wire_type, tag, &mut message, DecodeContext::default())
                .map_err(|_| "a field is cut or of no kind")?,
        }
    }
    if envelope.is_empty() {
        return Err("it has no encryptedDEKSource");
    }
    Ok((object, envelope))
}

/// The name of a map's entry.
fn annotation(mut entry: &[u8]) -> Result<String, &'static str> {
    let mut name = String::new();
    while !entry.is_empty() {
        let (tag, wire_type) = decode_key(&mut entry).map_err(|_| "an annotation has no number")?;
        if (tag, wire_type) == (1, WireType::LengthDelimited) {
            name = text(take(&mut entry)?)?;
        } else {
            skip_field(wire_type, tag, &mut entry, DecodeContext::default())
                .map_err(|_| "an annotation is cut")?;
        }
    }
    Ok(name)
}

fn take<'a>(message: &mut &'a [u8]) -> Result<&'a [u8], &'static str> {
    let len = decode_varint(message).map_err(|_| "a field has no length")?;
    let len = usize::try_from(len).map_err(|_| "a field is longer than the value")?;
    let (field, rest) = message
        .split_at_checked(len)
        .ok_or("a field is longer than the value")?;
    *message = rest;
    Ok(field)
}

fn text(bytes: &[u8]) -> Result<String, &'static str> {
    let text = std::str::from_utf8(bytes).map_err(|_| "a text in it is not UTF-8")?;
    Ok(text.escape_debug().to_string())
}

fn from_hex(text: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(text).ok()?;
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok())
        .collect()
}

/// Of either alphabet, with or without padding: tools differ.
fn from_base64(text: &[u8]) -> Option<Vec<u8>> {
    let config =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    [&alphabet::STANDARD, &alphabet::URL_SAFE]
        .into_iter()
        .find_map(|alphabet| GeneralPurpose::new(alphabet, config).decode(text).ok())
}
