//! PKCS#11 URIs (RFC 7512), as far as they name tokens and keys.
//!
//! Strict where the RFC leaves room, because a URI that is half understood finds the wrong key:
//! an attribute given twice, an unknown one, an empty path and a bad escape are errors. Query
//! attributes are refused with the place where the setting belongs: a PIN in a URI would end up in
//! logs.

use std::fmt;

use thiserror::Error;

/// What a key must be (`type`, CKA_CLASS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ObjectType {
    /// `public`
    Public,
    /// `private`
    Private,
    /// `cert`
    Certificate,
    /// `secret-key`
    SecretKey,
    /// `data`
    Data,
}

/// A parsed URI. Attributes that are absent match anything.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash)]
pub struct Uri {
    /// `token`: CK_TOKEN_INFO label.
    pub token: Option<String>,
    /// `serial`: CK_TOKEN_INFO serialNumber.
    pub serial: Option<String>,
    /// `manufacturer`: CK_TOKEN_INFO manufacturerID.
    pub manufacturer: Option<String>,
    /// `model`: CK_TOKEN_INFO model.
    pub model: Option<String>,
    /// `slot-id`: CK_SLOT_ID. Unstable on most HSMs; label or serial number are better.
    pub slot_id: Option<u64>,
    /// `object`: CKA_LABEL.
    pub object: Option<String>,
    /// `id`: CKA_ID.
    pub id: Option<Vec<u8>>,
    /// `type`: CKA_CLASS.
    pub object_type: Option<ObjectType>,
}

/// Why a text is no URI that we can act on.
#[derive(Debug, Error, PartialEq, Eq, Clone)]
pub enum UriError {
    /// Another scheme.
    #[error("a PKCS#11 URI begins with `pkcs11:`")]
    Scheme,
    /// Nothing after the scheme: it would match everything.
    #[error("the URI names nothing; give at least one attribute, such as `token=LABEL`")]
    Empty,
    /// An attribute RFC 7512 does not define, or that this daemon does not use.
    #[error("unknown attribute `{name}`{}", .nearest.as_ref().map(|n| format!("; did you mean `{n}`?")).unwrap_or_default())]
    Unknown {
        /// As written.
        name: String,
        /// The nearest one that exists.
        nearest: Option<&'static str>,
    },
    /// Given twice.
    #[error("attribute `{0}` is given twice")]
    Twice(&'static str),
    /// No `=`.
    #[error("`{0}` is not of the form `attribute=value`")]
    NoValue(String),
    /// A `%` that two hex digits do not follow, or a character that must be escaped.
    #[error("the value of `{0}` has a bad or missing percent-escape")]
    Escape(&'static str),
    /// Bytes that are no UTF-8 in a text attribute.
    #[error("the value of `{0}` is not UTF-8")]
    NotText(&'static str),
    /// `type` or `slot-id` with another value.
    #[error("`{value}` is no value of `{name}`; {expected}")]
    Value {
        /// Attribute.
        name: &'static str,
        /// As written.
        value: String,
        /// What may be there.
        expected: &'static str,
    },
    /// `?pin-value=…` and the like.
    #[error(
        "query attributes (`?…`) are not taken from a URI; module and PIN have fields of their own in the configuration"
    )]
    Query,
}

const ATTRIBUTES: [&str; 8] = [
    "token",
    "serial",
    "manufacturer",
    "model",
    "slot-id",
    "object",
    "id",
    "type",
];

/// Every `type` value of RFC 7512 §2.3, with its meaning.
const TYPES: [(&str, ObjectType); 5] = [
    ("public", ObjectType::Public),
    ("private", ObjectType::Private),
    ("cert", ObjectType::Certificate),
    ("secret-key", ObjectType::SecretKey),
    ("data", ObjectType::Data),
];

impl Uri {
    /// Parses the text form.
    pub fn parse(text: &str) -> Result<Self, UriError> {
        let path = text.strip_prefix("pkcs11:").ok_or(UriError::Scheme)?;
        if path.contains('?') {
            return Err(UriError::Query);
        }
        if path.is_empty() {
            return Err(UriError::Empty);
        }
        let mut uri = Self::default();
        for attribute in path.split(';') {
            uri.set(attribute)?;
        }
        Ok(uri)
    }

    fn set(&mut self, attribute: &str) -> Result<(), UriError> {
        let (written, value) = attribute
            .split_once('=')
            .ok_or_else(|| UriError::NoValue(attribute.to_owned()))?;
        let name = ATTRIBUTES
            .into_iter()
            .find(|name| *name == written)
            .ok_or_else(|| UriError::Unknown {
                name: written.to_owned(),
                nearest: nearest(written, ATTRIBUTES),
            })?;
        match name {
            "token" => once(&mut self.token, name, unescape_text(name, value)?),
            "serial" => once(&mut self.serial, name, unescape_text(name, value)?),
            "manufacturer" => once(&mut self.manufacturer, name, unescape_text(name, value)?),
            "model" => once(&mut self.model, name, unescape_text(name, value)?),
            "object" => once(&mut self.object, name, unescape_text(name, value)?),
            "id" => once(&mut self.id, name, unescape(name, value)?),
            "slot-id" => once(&mut self.slot_id, name, parse_slot(value)?),
            _ => once(&mut self.object_type, name, parse_type(value)?),
        }
    }

    /// True when it names an object, not only a token.
    pub fn names_object(&self) -> bool {
        self.object.is_some() || self.id.is_some() || self.object_type.is_some()
    }

    /// Do the token attributes match this token?
    pub fn matches_token(&self, token: &crate::host::TokenInfo, slot_id: Option<u64>) -> bool {
        fn is(wanted: Option<&String>, found: &str) -> bool {
            wanted.is_none_or(|wanted| wanted == found)
        }
        is(self.token.as_ref(), &token.label)
            && is(self.serial.as_ref(), &token.serial)
            && is(self.manufacturer.as_ref(), &token.manufacturer)
            && is(self.model.as_ref(), &token.model)
            && (self.slot_id.is_none() || slot_id.is_none() || self.slot_id == slot_id)
    }

    /// Do the object attributes match a secret key with this label and id?
    pub fn matches_secret_key(&self, label: &str, id: &[u8]) -> bool {
        self.object.as_ref().is_none_or(|wanted| wanted == label)
            && self.id.as_ref().is_none_or(|wanted| wanted == id)
            && matches!(self.object_type, None | Some(ObjectType::SecretKey))
    }
}

fn once<T>(field: &mut Option<T>, name: &'static str, value: T) -> Result<(), UriError> {
    match field.replace(value) {
        None => Ok(()),
        Some(_) => Err(UriError::Twice(name)),
    }
}

fn parse_slot(value: &str) -> Result<u64, UriError> {
    // u64::from_str would take a leading `+`.
    if value.bytes().all(|b| b.is_ascii_digit())
        && let Ok(slot) = value.parse()
    {
        return Ok(slot);
    }
    Err(UriError::Value {
        name: "slot-id",
        value: value.to_owned(),
        expected: "it is a decimal number",
    })
}

fn parse_type(value: &str) -> Result<ObjectType, UriError> {
    TYPES
        .iter()
        .find(|(name, _)| *name == value)
        .map(|(_, object_type)| *object_type)
        .ok_or_else(|| UriError::Value {
            name: "type",
            value: value.to_owned(),
            expected: "it is one of public, private, cert, secret-key, data",
        })
}

fn unescape_text(name: &'static str, value: &str) -> Result<String, UriError> {
    String::from_utf8(unescape(name, value)?).map_err(|_| UriError::NotText(name))
}

fn unescape(name: &'static str, value: &str) -> Result<Vec<u8>, UriError> {
    let mut out = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte == b'%' {
            let (digits, tail) = rest
                .split_first_chunk::<2>()
                .ok_or(UriError::Escape(name))?;
            let digit = |b: u8| (b as char).to_digit(16).ok_or(UriError::Escape(name));
            out.push((digit(digits[0])? << 4 | digit(digits[1])?) as u8);
            rest = tail;
        } else if is_plain(byte) {
            out.push(byte);
        } else {
            return Err(UriError::Escape(name));
        }
    }
    Ok(out)
}

/// Characters that stand for themselves in a path attribute (RFC 7512 §2.3, `pk11-pchar`).
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~:[]@!$'()*+,=&".contains(&byte)
}

/// The candidate that is at most a third of its letters away from `written`.
pub fn nearest<'a>(
    written: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (distance(written, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= candidate.len().div_ceil(3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance in bytes. Quadratic; both sides are names in a configuration.
fn distance(a: &str, b: &str) -> usize {
    let a = &a.as_bytes()[..a.len().min(64)];
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(*x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// The canonical text: attributes in a fixed order, everything but unreserved characters escaped.
impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "pkcs11:";
        let mut put = |name: &str, value: &[u8], always: bool| {
            write!(f, "{separator}{name}=")?;
            separator = ";";
            for &byte in value {
                if !always && (byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)) {
                    write!(f, "{}", byte as char)?;
                } else {
                    write!(f, "%{byte:02X}")?;
                }
            }
            Ok(())
        };
        let texts = [
            ("token", &self.token),
            ("serial", &self.serial),
            ("manufacturer", &self.manufacturer),
            ("model", &self.model),
            ("object", &self.object),
        ];
        for (name, value) in texts {
            if let Some(value) = value {
                put(name, value.as_bytes(), false)?;
            }
        }
        if let Some(slot) = self.slot_id {
            put("slot-id", slot.to_string().as_bytes(), false)?;
        }
        if let Some(id) = &self.id {
            put("id", id, true)?;
        }
        if let Some(wanted) = self.object_type {
            let name = TYPES.iter().find(|(_, t)| *t == wanted).map_or("", |t| t.0);
            put("type", name.as_bytes(), false)?;
        }
        Ok(())
    }
}
