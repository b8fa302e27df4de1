//! Finding a key, and making sure that it is the key that was meant.
//!
//! What identifies a key is its fingerprint; label and id only say where to look. A handle is never
//! trusted across sessions, logins or re-initialisations: libraries have been seen to give the same
//! number to another object.

use cryptoki_sys::*;
use hsm_wire::fault::FaultKind;
use hsm_wire::host::{KeyClass, KeyRef, MAX_NAME_LEN};
use hsm_wire::identity::{FINGERPRINT_BLOCK, Fingerprint, FingerprintMethod};

use crate::failure::Failure;
use crate::module::{Mechanism, Module};
use crate::rsa;
use crate::wrap::{MacKeys, Partners};

/// More objects than this with one label and id are not looked at: two are one too many already.
const MAX_NAMESAKES: usize = 16;

/// Where a call is made.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    /// In which module.
    pub(crate) module: &'a Module,
    /// On which session.
    pub(crate) session: CK_SESSION_HANDLE,
}

/// `CKO_*`
pub(crate) fn object_class(class: KeyClass) -> CK_OBJECT_CLASS {
    match class {
        KeyClass::Secret => CKO_SECRET_KEY,
        KeyClass::Private => CKO_PRIVATE_KEY,
    }
}

/// `CKK_*`
pub(crate) fn key_type(class: KeyClass) -> CK_KEY_TYPE {
    match class {
        KeyClass::Secret => CKK_AES,
        KeyClass::Private => CKK_RSA,
    }
}

/// The class, for people.
pub(crate) fn class_name(class: KeyClass) -> &'static str {
    match class {
        KeyClass::Secret => "secret key",
        KeyClass::Private => "private key",
    }
}

/// The handle of the one key of this class, label and id, or None when there is none. Its
/// fingerprint is compared; another key in its place is an error.
pub(crate) fn find(
    place: Place<'_>,
    class: KeyClass,
    key: &KeyRef,
) -> Result<Option<CK_OBJECT_HANDLE>, Failure> {
    let object_class = object_class(class).to_ne_bytes();
    // By its type too: the key for HMAC beside a wrapping key may have its label as well.
    let kind = key_type(class).to_ne_bytes();
    let mut wanted: Vec<(CK_ATTRIBUTE_TYPE, &[u8])> = vec![
        (CKA_CLASS, &object_class),
        (CKA_KEY_TYPE, &kind),
        (CKA_TOKEN, &[CK_TRUE]),
    ];
    // What an empty value in a search template matches differs by vendor; `has_name` is exact.
    if !key.label.is_empty() {
        wanted.push((CKA_LABEL, key.label.as_bytes()));
    }
    if !key.id.is_empty() {
        wanted.push((CKA_ID, &key.id));
    }
    let mut found = Vec::new();
    for object in place.module.find(place.session, &wanted, MAX_NAMESAKES)? {
        if has_name(place, object, key)? {
            found.push(object);
        }
    }
    match found[..] {
        [] => Ok(None),
        [object] => {
            check_fingerprint(place, object, class, key)?;
            Ok(Some(object))
        }
        _ => Err(Failure::settled(
            FaultKind::KeyAmbiguous,
            format!(
                "{} {}s are {}; give one of them another id",
                found.len(),
                class_name(class),
                name(key)
            ),
        )),
    }
}

/// Errors unless `object` is the key that is meant.
pub(crate) fn check_fingerprint(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    class: KeyClass,
    key: &KeyRef,
) -> Result<(), Failure> {
    if fingerprint(place, object, class)? == key.fingerprint {
        return Ok(());
    }
    // The fingerprint may date from before the token could compute a CMAC, or the key sign with it.
    if class == KeyClass::Secret && fingerprint_by_ecb(place, object)? == Some(key.fingerprint) {
        return Ok(());
    }
    Err(Failure::settled(
        FaultKind::KeyChanged,
        format!(
            "the {} {} is another one than before: its fingerprint is not {}",
            class_name(class),
            name(key),
            key.fingerprint.prefix()
        ),
    ))
}

/// The key's fingerprint: of an RSA key's public half; of an AES key by CMAC, else, if key or token
/// have none, by ECB.
pub(crate) fn fingerprint(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    class: KeyClass,
) -> Result<Fingerprint, Failure> {
    if class == KeyClass::Private {
        return rsa::fingerprint(place, object);
    }
    let mut block = FINGERPRINT_BLOCK;
    let mut image = [0; 64];
    let signed = place.module.sign(
        place.session,
        Mechanism::Cmac,
        object,
        &mut block,
        &mut image,
    );
    match signed {
        Ok(written) => Ok(Fingerprint::of_block_image(
            FingerprintMethod::Cmac,
            &one_block("C_Sign", &image, written)?,
        )),
        // Only a definite no leads to the other method: an error that passes must not change the
        // key's name.
        Err(Failure::Call(error)) if error.is_refusal() => fingerprint_by_ecb(place, object)?
            .ok_or_else(|| {
                Failure::Final(error.fault(
                    FaultKind::Refused,
                    "the key can be used neither for CMAC nor for ECB, so it cannot be told from \
                     another",
                ))
            }),
        Err(failure) => Err(failure),
    }
}

/// What some wraps need beside the key.
pub(crate) fn find_partners(
    place: Place<'_>,
    class: KeyClass,
    key: &KeyRef,
    object: CK_OBJECT_HANDLE,
) -> Result<Partners, Failure> {
    Ok(Partners {
        macs: MacKeys::find(place, &key.id)?,
        public: match class {
            KeyClass::Secret => None,
            KeyClass::Private => rsa::find_public(place, object, &key.id)?,
        },
    })
}

fn fingerprint_by_ecb(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
) -> Result<Option<Fingerprint>, Failure> {
    let mut block = FINGERPRINT_BLOCK;
    let mut image = [0; 64];
    let encrypted = place.module.encrypt(
        place.session,
        Mechanism::Ecb,
        object,
        &mut block,
        &mut image,
    );
    match encrypted {
        Ok(written) => Ok(Some(Fingerprint::of_block_image(
            FingerprintMethod::Ecb,
            &one_block("C_Encrypt", &image, written)?,
        ))),
        Err(Failure::Call(error)) if error.is_refusal() => Ok(None),
        Err(failure) => Err(failure),
    }
}

fn one_block(
    function: &'static str,
    image: &[u8; 64],
    written: usize,
) -> Result<[u8; 16], Failure> {
    match image[..written].try_into() {
        Ok(block) => Ok(block),
        Err(_) => Err(Failure::Broken {
            function,
            detail: format!("it gave {written} bytes for one AES block"),
        }),
    }
}

fn has_name(place: Place<'_>, object: CK_OBJECT_HANDLE, key: &KeyRef) -> Result<bool, Failure> {
    let mut value = [0; MAX_NAME_LEN];
    let mut is = |kind, wanted: &[u8]| {
        let len = place
            .module
            .attribute(place.session, object, kind, &mut value)?;
        Ok::<bool, Failure>(len.map_or(wanted.is_empty(), |len| &value[..len] == wanted))
    };
    Ok(is(CKA_LABEL, key.label.as_bytes())? && is(CKA_ID, &key.id)?)
}

/// The key's label and id, for people.
pub(crate) fn name(key: &KeyRef) -> String {
    format!("`{}` (id {})", key.label, hsm_wire::identity::hex(&key.id))
}
