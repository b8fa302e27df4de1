//! AES-GCM: `IV ‖ ciphertext ‖ tag (16)`, whoever chose the IV.
//!
//! | IV | when sealing | bytes |
//! |---|---|---|
//! | the caller's | we give random bytes of the token | 12 |
//! | returned | we give zeros, the token writes over them (AWS CloudHSM refuses anything else) | 12 |
//! | appended | the token ignores ours and puts its own behind the tag (Luna in FIPS mode) | 16 |
//!
//! Opening is the same for all, so that any token with AES-GCM opens what another one sealed.

use cryptoki_sys::CK_OBJECT_HANDLE;
use hsm_wire::envelope::{GCM_APPENDED_IV_LEN, GCM_IV_LEN, GCM_TAG_LEN, IvMode, Wrap};
use hsm_wire::fault::FaultKind;
use hsm_wire::secret::Secret;
use zeroize::Zeroize;

use super::{SLACK, Scratch, load};
use crate::failure::Failure;
use crate::key::Place;
use crate::module::Mechanism;

/// What it says of a token that has its own mind about the IV.
pub(crate) const OWN_IV: &str = "the token does not take our IV for AES-GCM but chooses its own";

fn iv_len(mode: IvMode) -> usize {
    match mode {
        IvMode::Appended => GCM_APPENDED_IV_LEN,
        _ => GCM_IV_LEN,
    }
}

pub(super) fn seal(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    mode: IvMode,
    aad: &[u8],
    plaintext: &[u8],
    scratch: &mut Scratch,
) -> Result<Vec<u8>, Failure> {
    let iv_len = iv_len(mode);
    let mut room = [0; GCM_APPENDED_IV_LEN];
    let given = &mut room[..iv_len];
    if mode != IvMode::Returned {
        scratch.fresh_iv(place, given)?;
    }
    let mut iv = room;
    let (aad, input) = load(&mut scratch.aad, aad, &mut scratch.input, plaintext)?;
    let mut sealed = vec![0; iv_len + plaintext.len() + GCM_TAG_LEN + SLACK];
    let written = place.module.encrypt(
        place.session,
        Mechanism::Gcm {
            iv: &mut iv[..iv_len],
            aad,
        },
        object,
        input,
        &mut sealed[iv_len..],
    );
    scratch.input[..plaintext.len()].zeroize();
    let written = written?;
    let expected = plaintext.len() + GCM_TAG_LEN;
    let appended = written == expected + GCM_APPENDED_IV_LEN;
    let used = match mode {
        IvMode::Appended if appended => {
            let at = iv_len + expected;
            iv.copy_from_slice(&sealed[at..at + GCM_APPENDED_IV_LEN]);
            iv
        }
        IvMode::Appended => return Err(refused("the token does not append an IV")),
        IvMode::Returned if appended => return Err(refused(OWN_IV)),
        // What was sealed under the IV of zeros is not given to anybody: one such message betrays
        // nothing, and there is no second one, since the self-test then goes on to another wrap.
        IvMode::Returned if iv == room => return Err(refused("the token does not return an IV")),
        IvMode::Returned => iv,
        _ if appended || iv != room => return Err(refused(OWN_IV)),
        _ => iv,
    };
    if !appended && written != expected {
        return Err(Failure::Broken {
            function: "C_Encrypt",
            detail: format!("it gave {written} bytes for {} and a tag", plaintext.len()),
        });
    }
    if mode != IvMode::Caller && !scratch.is_fresh(&used[..iv_len]) {
        return Err(refused("the token chooses the same IV again"));
    }
    sealed[..iv_len].copy_from_slice(&used[..iv_len]);
    sealed.truncate(iv_len + expected);
    Ok(sealed)
}

fn refused(detail: &str) -> Failure {
    Failure::settled(FaultKind::Refused, detail)
}

/// The caller has checked the lengths.
pub(super) fn unseal(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    wrap: Wrap,
    aad: &[u8],
    sealed: &[u8],
    plaintext_len: usize,
    scratch: &mut Scratch,
) -> Result<Secret, Failure> {
    let (iv, ciphertext) = sealed.split_at(iv_len(wrap.iv_mode));
    let mut room = [0; GCM_APPENDED_IV_LEN];
    let copy = &mut room[..iv.len()];
    copy.copy_from_slice(iv);
    let (aad, input) = load(&mut scratch.aad, aad, &mut scratch.input, ciphertext)?;
    let written = place.module.decrypt(
        place.session,
        Mechanism::Gcm { iv: copy, aad },
        object,
        input,
        &mut scratch.output,
    );
    scratch.take_plaintext("C_Decrypt", written, plaintext_len)
}
