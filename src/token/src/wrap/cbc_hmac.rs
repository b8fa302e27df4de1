//! AES-CBC-PAD, then HMAC: `IV (16) ‖ ciphertext ‖ mark (8) ‖ MAC (16)`.
//!
//! Encrypt, then MAC; nothing is decrypted before its MAC was found right, so that no padding can be
//! probed.

use cryptoki_sys::CK_OBJECT_HANDLE;
use hsm_wire::envelope::CBC_IV_LEN;
use hsm_wire::host::KeyRef;
use hsm_wire::secret::Secret;
use zeroize::Zeroize;

use super::{MacKeys, Scratch, load};
use crate::failure::Failure;
use crate::key::Place;
use crate::module::Mechanism;

pub(super) fn seal(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    macs: &MacKeys,
    aad: &[u8],
    plaintext: &[u8],
    scratch: &mut Scratch,
) -> Result<Vec<u8>, Failure> {
    let mut iv = [0; CBC_IV_LEN];
    scratch.fresh_iv(place, &mut iv)?;
    let mut sealed = iv.to_vec();
    let (_, input) = load(&mut scratch.aad, &[], &mut scratch.input, plaintext)?;
    let written = place.module.encrypt(
        place.session,
        Mechanism::CbcPad { iv: &mut iv },
        object,
        input,
        &mut scratch.output,
    );
    scratch.input[..plaintext.len()].zeroize();
    let written = written?;
    let expected = (plaintext.len() + 1).next_multiple_of(16);
    if written != expected {
        return Err(super::refused(format!(
            "AES-CBC-PAD of {} bytes gives {written}, not {expected}",
            plaintext.len()
        )));
    }
    sealed.extend_from_slice(&scratch.output[..written]);
    macs.append(place, aad, &mut sealed, scratch)?;
    Ok(sealed)
}

/// The caller has checked the lengths.
#[expect(clippy::too_many_arguments, reason = "two keys and what they open")]
pub(super) fn unseal(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    key: &KeyRef,
    macs: &MacKeys,
    aad: &[u8],
    sealed: &[u8],
    plaintext_len: usize,
    scratch: &mut Scratch,
) -> Result<Secret, Failure> {
    let body = macs.check(place, key, aad, sealed, scratch)?;
    let (iv, ciphertext) = body.split_at(CBC_IV_LEN);
    let mut iv: [u8; CBC_IV_LEN] = iv.try_into().unwrap_or_default();
    let (_, input) = load(&mut scratch.aad, &[], &mut scratch.input, ciphertext)?;
    let written = place.module.decrypt(
        place.session,
        Mechanism::CbcPad { iv: &mut iv },
        object,
        input,
        &mut scratch.output,
    );
    scratch.take_plaintext("C_Decrypt", written, plaintext_len)
}
