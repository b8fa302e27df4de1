//! AES-KWP (SP 800-38F) by `C_WrapKey` and `C_UnwrapKey`, of SHA-256(AAD) ‖ plaintext.
//!
//! It authenticates what it wraps but has no AAD, so the AAD's hash is wrapped along and compared. The
//! token must take a plaintext as a session object and show the one that it unwrapped: strict ones do
//! neither.

use cryptoki_sys::{CK_OBJECT_HANDLE, CKA_VALUE};
use hsm_wire::envelope::AAD_DIGEST_LEN;
use hsm_wire::secret::Secret;
use sha2::{Digest, Sha256};
use zeroize::Zeroize;

use super::{Scratch, equal, load, tampered};
use crate::failure::Failure;
use crate::key::Place;
use crate::module::Mechanism;

pub(super) fn seal(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    aad: &[u8],
    plaintext: &[u8],
    expected: usize,
    scratch: &mut Scratch,
) -> Result<Vec<u8>, Failure> {
    let len = AAD_DIGEST_LEN + plaintext.len();
    scratch.input[..AAD_DIGEST_LEN].copy_from_slice(&Sha256::digest(aad));
    scratch.input[AAD_DIGEST_LEN..len].copy_from_slice(plaintext);
    let imported = place
        .module
        .import(place.session, &mut scratch.input[..len]);
    scratch.input[..len].zeroize();
    let imported = imported?;
    let output = &mut scratch.output;
    let written = by_either_number(|mechanism| {
        place
            .module
            .wrap_key(place.session, mechanism, object, imported, output)
    });
    place.module.destroy(place.session, imported);
    let written = written?;
    if written != expected {
        return Err(super::refused(format!(
            "AES-KWP of {len} bytes gives {written}, not {expected}"
        )));
    }
    Ok(scratch.output[..written].to_vec())
}

/// The caller has checked the lengths.
pub(super) fn unseal(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    aad: &[u8],
    sealed: &[u8],
    plaintext_len: usize,
    scratch: &mut Scratch,
) -> Result<Secret, Failure> {
    let (_, input) = load(&mut scratch.aad, &[], &mut scratch.input, sealed)?;
    let unwrapped = by_either_number(|mechanism| {
        place
            .module
            .unwrap_key(place.session, mechanism, object, input)
    })?;
    let len = place
        .module
        .attribute(place.session, unwrapped, CKA_VALUE, &mut scratch.output);
    place.module.destroy(place.session, unwrapped);
    let expected = AAD_DIGEST_LEN + plaintext_len;
    let plaintext = match len {
        Ok(Some(len)) if len == expected => {
            let (digest, plaintext) = scratch.output[..len].split_at(AAD_DIGEST_LEN);
            if equal(digest, &Sha256::digest(aad)) {
                Ok(Secret::copy_of(plaintext))
            } else {
                Err(tampered(
                    None,
                    "the sealed bytes were sealed with another header",
                ))
            }
        }
        Ok(Some(len)) => Err(super::refused(format!(
            "AES-KWP of {expected} bytes gives {len} back"
        ))),
        Ok(None) => Err(super::refused(
            "the token does not show what it unwrapped".to_owned(),
        )),
        Err(failure) => Err(failure),
    };
    scratch.output[..expected].zeroize();
    plaintext
}

/// By the mechanism's number of PKCS#11 3.0, else by the one before.
fn by_either_number<T>(
    mut call: impl FnMut(Mechanism<'_>) -> Result<T, Failure>,
) -> Result<T, Failure> {
    match call(Mechanism::Kwp) {
        Err(Failure::Call(error)) if error.is_refusal() => call(Mechanism::KwpByItsOldNumber),
        outcome => outcome,
    }
}
