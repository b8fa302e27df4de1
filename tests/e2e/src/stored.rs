//! What kube-apiserver stores of a Secret: `k8s:enc:kms:v2:PROVIDER:` and the protobuf message
//! `EncryptedObject`. Only what the tests compare is read.

use anyhow::{Context, Result, ensure};

use crate::cluster::STORED_PREFIX;

/// Where the key's fingerprint stands in an envelope of ours.
const FINGERPRINT: std::ops::Range<usize> = 8..16;

/// Under what a Secret is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The `key_id` beside the envelope.
    pub key_id: String,
    /// Fingerprint of the key in the envelope's header, in hexadecimal.
    pub fingerprint: String,
}

/// Reads a value from etcd.
pub fn read(value: &[u8]) -> Result<Stored> {
    let object = value
        .strip_prefix(STORED_PREFIX.as_bytes())
        .context("the value is not sealed by this plugin")?;
    let key_id = field(object, 2)?.context("the object has no key_id")?;
    let envelope = field(object, 3)?.context("the object has no envelope")?;
    ensure!(envelope.starts_with(b"THSM"), "the envelope is not ours");
    let fingerprint = envelope
        .get(FINGERPRINT)
        .context("the envelope is cut short")?;
    Ok(Stored {
        key_id: String::from_utf8(key_id.to_vec())?,
        fingerprint: fingerprint
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
    })
}

/// The bytes of a length-delimited field of a protobuf message.
pub fn field(mut message: &[u8], wanted: u64) -> Result<Option<&[u8]>> {
    while !message.is_empty() {
        let tag = varint(&mut message)?;
        if tag & 7 == 0 {
            varint(&mut message)?;
            continue;
        }
        ensure!(tag & 7 == 2, "an EncryptedObject has no field like {tag}");
        let len = usize::try_from(varint(&mut message)?)?;
        let (value, rest) = message
            .split_at_checked(len)
            .context("the object is cut short")?;
        if tag >> 3 == wanted {
            return Ok(Some(value));
        }
        message = rest;
    }
    Ok(None)
}

fn varint(message: &mut &[u8]) -> Result<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first().context("the object is cut short")?;
        *message = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    anyhow::bail!("a number in the object does not end")
}
