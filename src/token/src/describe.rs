//! What is on the token: its AES keys, who they are, and how each can wrap.

use cryptoki_sys::*;
use hsm_wire::envelope::Wrap;
use hsm_wire::host::{
    Description, KeyClass, KeyInfo, KeyRef, MAX_KEYS, MAX_MESSAGE_LEN, MAX_NAME_LEN, TokenInfo,
};
use hsm_wire::identity::Fingerprint;

use crate::failure::Failure;
use crate::key::{self, Place};
use crate::token::Token;
use crate::wrap::{self, Scratch};

/// Secret keys looked at. A token with more is not one for a node's daemon.
const MAX_OBJECTS: usize = 4096;
/// The message's head, and the token's four texts of at most [`MAX_NAME_LEN`] bytes each.
const ROOM_FOR_THE_REST: usize = 64 + 4 * (2 + MAX_NAME_LEN);
/// Plaintexts of the self-test: shorter than a block, one byte more and less than blocks, whole
/// blocks. Odd ones are where tokens have been seen to pad.
const LENGTHS: [usize; 4] = [1, 15, 32, 33];

/// Describes the token by `session`. Keys that cannot be told apart are counted, not listed.
pub(crate) fn describe(
    token: &Token,
    info: &TokenInfo,
    place: Place<'_>,
    scratch: &mut Scratch,
) -> Result<Description, Failure> {
    let class = CKO_SECRET_KEY.to_ne_bytes();
    let wanted: [(CK_ATTRIBUTE_TYPE, &[u8]); 2] = [(CKA_CLASS, &class), (CKA_TOKEN, &[CK_TRUE])];
    let objects = place.module.find(place.session, &wanted, MAX_OBJECTS)?;
    let total = objects.len();
    let mut keys = Vec::new();
    let mut first_failure = None;
    for object in objects {
        match read_key(place, object) {
            Ok(Some(key)) => keys.push((key, object)),
            Ok(None) => {}
            Err(failure) if tells_of_one_key(&failure) => {
                first_failure.get_or_insert(failure);
            }
            Err(failure) => return Err(failure),
        }
    }
    // When no key at all works it is the token that fails, and the ladder's business.
    if keys.is_empty()
        && let Some(failure) = first_failure
    {
        return Err(failure);
    }
    keys.sort_by(|(a, _), (b, _)| (&a.key.label, &a.key.id).cmp(&(&b.key.label, &b.key.id)));
    let mut listed = Vec::new();
    let mut room = MAX_MESSAGE_LEN - ROOM_FOR_THE_REST;
    for (mut key, object) in keys.into_iter().take(MAX_KEYS) {
        key.wrap = choose_wrap(token, place, object, &key.key.fingerprint, scratch)?;
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
    64 + key.key.id.len() + key.key.label.len() + reason
}

/// A failure that names neither session nor token may be one key's own: an HSM gives
/// CKR_DEVICE_ERROR for a key in a state it does not like.
fn tells_of_one_key(failure: &Failure) -> bool {
    match failure {
        Failure::Call(error) => error.is_refusal() || error.may_mean_tampered(),
        Failure::Final(_) => true,
        _ => false,
    }
}

/// What can be said of an object, if it is an AES key that can be fingerprinted.
fn read_key(place: Place<'_>, object: CK_OBJECT_HANDLE) -> Result<Option<KeyInfo>, Failure> {
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
    if number(CKA_KEY_TYPE)? != Some(CKK_AES) {
        return Ok(None);
    }
    // A label that is no text or too long cannot be asked for.
    let (Some(label), Some(id)) = (bytes(CKA_LABEL)?, bytes(CKA_ID)?) else {
        return Ok(None);
    };
    let Ok(label) = String::from_utf8(label) else {
        return Ok(None);
    };
    let bits = number(CKA_VALUE_LEN)?
        .and_then(|len| u16::try_from(len * 8).ok())
        .unwrap_or(0);
    Ok(Some(KeyInfo {
        key: KeyRef {
            id,
            label,
            fingerprint: key::fingerprint(place, object)?,
        },
        class: KeyClass::Secret,
        bits,
        sensitive: flag(CKA_SENSITIVE, false)?,
        extractable: flag(CKA_EXTRACTABLE, true)?,
        never_extractable: flag(CKA_NEVER_EXTRACTABLE, false)?,
        wrap: Err(String::new()),
        passed_over: Vec::new(),
    }))
}

/// The first wrap that passes the self-test, or why none does. Tested once per key and process.
fn choose_wrap(
    token: &Token,
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    fingerprint: &Fingerprint,
    scratch: &mut Scratch,
) -> Result<Result<Wrap, String>, Failure> {
    if let Some(known) = token.known_wrap(fingerprint) {
        return Ok(known);
    }
    let wrap = Wrap::AES_GCM;
    let tested = match self_test(place, object, wrap, scratch) {
        Ok(Ok(())) => Ok(wrap),
        Ok(Err(reason)) => Err(format!("AES-GCM: {reason}")),
        Err(failure) if tells_of_one_key(&failure) => {
            let reason = failure.into_fault("seal and unseal test bytes");
            // Not noted: it may pass.
            return Ok(Err(format!("AES-GCM: {reason}")));
        }
        Err(failure) => return Err(failure),
    };
    token.note_wrap(*fingerprint, tested.clone());
    Ok(tested)
}

/// Seals and unseals bytes of several lengths, then changes each part and expects a refusal. The
/// inner error says what the token does wrong.
fn self_test(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    wrap: Wrap,
    scratch: &mut Scratch,
) -> Result<Result<(), String>, Failure> {
    const AAD: &[u8] = b"talos-hsm self-test v1";
    let mut bytes = [0; 33];
    place.module.random(place.session, &mut bytes)?;
    let mut sealed = Vec::new();
    for len in LENGTHS {
        let plaintext = &bytes[..len];
        sealed = wrap::seal(place, object, wrap, AAD, plaintext, scratch)?;
        let back = wrap::unseal(place, object, wrap, AAD, &sealed, len, scratch)?;
        if back.expose() != plaintext {
            return Ok(Err(format!("{len} bytes come back as others")));
        }
    }
    let mut accepts = |aad: &[u8], sealed: &[u8]| {
        wrap::unseal(place, object, wrap, aad, sealed, bytes.len(), scratch).is_ok()
    };
    if accepts(b"talos-hsm self-test v2", &sealed) {
        return Ok(Err("another AAD is accepted".to_owned()));
    }
    let last = sealed.len() - 1;
    for (part, at) in [("IV", 0), ("ciphertext", 12), ("tag", last)] {
        let mut changed = sealed.clone();
        changed[at] ^= 1;
        if accepts(AAD, &changed) {
            return Ok(Err(format!("a changed {part} is accepted")));
        }
    }
    Ok(Ok(()))
}
