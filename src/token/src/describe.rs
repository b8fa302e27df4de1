//! What is on the token: its keys that may wrap, who they are, and how each does.
//!
//! AES keys all; of RSA keys those that may decrypt and have a key for HMAC beside them, which nobody
//! makes but for this. A certificate authority's keys are none of our business.

use cryptoki_sys::*;
use hsm_wire::host::{
    Description, KeyClass, KeyInfo, KeyRef, MAX_KEYS, MAX_MESSAGE_LEN, MAX_NAME_LEN, TokenInfo,
};

use crate::failure::Failure;
use crate::key::{self, Place};
use crate::rsa;
use crate::selftest;
use crate::token::Token;
use crate::wrap::{MacKeys, Scratch};

/// Secret keys looked at. A token with more is not one for a node's daemon.
const MAX_OBJECTS: usize = 4096;
/// The message's head, and the token's four texts of at most [`MAX_NAME_LEN`] bytes each.
const ROOM_FOR_THE_REST: usize = 64 + 4 * (2 + MAX_NAME_LEN);

/// Describes the token by `session`. Keys that cannot be told apart are counted, not listed.
pub(crate) fn describe(
    token: &Token,
    info: &TokenInfo,
    place: Place<'_>,
    scratch: &mut Scratch,
) -> Result<Description, Failure> {
    let mut keys = Vec::new();
    let mut first_failure = None;
    let mut total = 0;
    for class in [KeyClass::Secret, KeyClass::Private] {
        let object_class = key::object_class(class).to_ne_bytes();
        let wanted: [(CK_ATTRIBUTE_TYPE, &[u8]); 2] =
            [(CKA_CLASS, &object_class), (CKA_TOKEN, &[CK_TRUE])];
        for object in place.module.find(place.session, &wanted, MAX_OBJECTS)? {
            let read = read_key(place, object, class);
            // An RSA key that is none of ours is not left out.
            total += usize::from(class == KeyClass::Secret || matches!(read, Ok(Some(_))));
            match read {
                Ok(Some(key)) => keys.push((key, object)),
                Ok(None) => {}
                Err(failure) if failure.tells_of_one_key() => {
                    if class == KeyClass::Secret {
                        first_failure.get_or_insert(failure);
                    }
                }
                Err(failure) => return Err(failure),
            }
        }
    }
    // When no key at all works it is the token that fails, and the ladder's business.
    if keys.is_empty()
        && let Some(failure) = first_failure
    {
        return Err(failure);
    }
    let order = |info: &KeyInfo| {
        let KeyRef { label, id, .. } = info.key.clone();
        (info.class as u8, label, id)
    };
    keys.sort_by_cached_key(|(info, _)| order(info));
    let mut listed = Vec::new();
    let mut room = MAX_MESSAGE_LEN - ROOM_FOR_THE_REST;
    for (mut key, object) in keys.into_iter().take(MAX_KEYS) {
        let choice = selftest::choose(token, place, key.class, &key.key, object, scratch)?;
        key.wrap = choice.wrap;
        key.passed_over = choice.passed_over;
        token.note_handle(&key.key, object);
        let Some(left) = room.checked_sub(size(&key)) else {
            break;
        };
        room = left;
        listed.push(key);
    }
    Ok(Description {
        token: info.clone(),
        omitted: u16::try_from(total - listed.len()).unwrap_or(u16::MAX),
        keys: listed,
    })
}

/// At least what a key takes in the message.
fn size(key: &KeyInfo) -> usize {
    let reason = key.wrap.as_ref().err().map_or(0, String::len);
    let passed_over = key.passed_over.iter();
    let passed_over: usize = passed_over.map(|better| 4 + better.reason.len()).sum();
    64 + key.key.id.len() + key.key.label.len() + reason + passed_over
}

/// What can be said of an object, if it is a key of ours that can be fingerprinted.
fn read_key(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    class: KeyClass,
) -> Result<Option<KeyInfo>, Failure> {
    let bytes = |kind| {
        let mut value = [0; MAX_NAME_LEN];
        let len = place
            .module
            .attribute(place.session, object, kind, &mut value)?;
        Ok::<_, Failure>(len.map(|len| value[..len].to_vec()))
    };
    let number = |kind| {
        let value = bytes(kind)?;
        Ok::<_, Failure>(value.and_then(|value| value.try_into().ok().map(CK_ULONG::from_ne_bytes)))
    };
    // Where a token does not say, the worse is assumed.
    let flag = |kind, otherwise| {
        let value = bytes(kind)?;
        Ok::<_, Failure>(match value.as_deref() {
            Some([byte]) => *byte != CK_FALSE,
            _ => otherwise,
        })
    };
    if number(CKA_KEY_TYPE)? != Some(key::key_type(class)) {
        return Ok(None);
    }
    // A label that is no text or too long cannot be asked for.
    let (Some(label), Some(id)) = (bytes(CKA_LABEL)?, bytes(CKA_ID)?) else {
        return Ok(None);
    };
    let Ok(label) = String::from_utf8(label) else {
        return Ok(None);
    };
    let bits = match class {
        KeyClass::Secret => number(CKA_VALUE_LEN)?
            .and_then(|len| u16::try_from(len * 8).ok())
            .unwrap_or(0),
        KeyClass::Private => {
            if !flag(CKA_DECRYPT, false)? || MacKeys::find(place, &id)?.is_empty() {
                return Ok(None);
            }
            rsa::bits(place, object)?
        }
    };
    Ok(Some(KeyInfo {
        key: KeyRef {
            id,
            label,
            fingerprint: key::fingerprint(place, object, class)?,
        },
        class,
        bits,
        sensitive: flag(CKA_SENSITIVE, false)?,
        extractable: flag(CKA_EXTRACTABLE, true)?,
        never_extractable: flag(CKA_NEVER_EXTRACTABLE, false)?,
        wrap: Err(String::new()),
        passed_over: Vec::new(),
    }))
}
