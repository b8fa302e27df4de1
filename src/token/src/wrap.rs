//! Sealing and unsealing, dispatched by the envelope header's [`Wrap`].
//!
//! AES-GCM with our IV is the one wrap there is. The sealed part is `IV (12) ‖ ciphertext ‖ tag (16)`.
//! Every other wrap the format knows is refused by name, never guessed at.

use cryptoki_sys::CK_OBJECT_HANDLE;
use hsm_wire::envelope::{IvMode, MAX_PLAINTEXT_LEN, Mechanism as How, Wrap};
use hsm_wire::fault::FaultKind;
use hsm_wire::host::MAX_AAD_LEN;
use hsm_wire::secret::Secret;
use zeroize::Zeroize;

use crate::failure::{CallError, Failure};
use crate::key::Place;
use crate::module::Mechanism;

const IV_LEN: usize = 12;
const TAG_LEN: usize = 16;
/// Room beyond what is expected, so that a token which appends something (its own IV, in FIPS mode)
/// is seen to do so. Without it the call would only say that the buffer is too small.
const SLACK: usize = 64;
const ROOM: usize = MAX_PLAINTEXT_LEN + TAG_LEN + SLACK;

/// Buffers of one session thread. Inputs are copied here before each call: a module gets pointers
/// that it may write through, and a second try must not see what the first one left.
pub(crate) struct Scratch {
    aad: [u8; MAX_AAD_LEN],
    input: [u8; ROOM],
    output: [u8; ROOM],
    last_iv: [u8; IV_LEN],
}

impl Scratch {
    /// Empty buffers.
    pub(crate) fn new() -> Self {
        Self {
            aad: [0; MAX_AAD_LEN],
            input: [0; ROOM],
            output: [0; ROOM],
            last_iv: [0; IV_LEN],
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.input.zeroize();
        self.output.zeroize();
    }
}

/// The sealed part for `plaintext`.
pub(crate) fn seal(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    wrap: Wrap,
    aad: &[u8],
    plaintext: &[u8],
    scratch: &mut Scratch,
) -> Result<Vec<u8>, Failure> {
    if plaintext.is_empty() || plaintext.len() > MAX_PLAINTEXT_LEN {
        return Err(Failure::settled(
            FaultKind::BadRequest,
            format!(
                "a plaintext of {} bytes is not sealed; it has 1 to {MAX_PLAINTEXT_LEN}",
                plaintext.len()
            ),
        ));
    }
    match wrap {
        Wrap::AES_GCM => seal_gcm(place, object, aad, plaintext, scratch),
        other => Err(not_here(other)),
    }
}

/// The plaintext of a sealed part, which must have `plaintext_len` bytes.
///
/// A failure of the decryption itself is reported as the call's error: whether it means that the
/// data does not authenticate is the caller's to find out (see [`crate::session`]).
pub(crate) fn unseal(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    wrap: Wrap,
    aad: &[u8],
    sealed: &[u8],
    plaintext_len: usize,
    scratch: &mut Scratch,
) -> Result<Secret, Failure> {
    match wrap {
        Wrap::AES_GCM => unseal_gcm(place, object, aad, sealed, plaintext_len, scratch),
        other => Err(not_here(other)),
    }
}

/// The fault for bytes that were changed since they were sealed, or sealed under something else.
pub(crate) fn tampered(error: Option<CallError>, detail: &str) -> Failure {
    Failure::Final(match error {
        Some(error) => error.fault(FaultKind::Tampered, detail),
        None => hsm_wire::fault::Fault::new(FaultKind::Tampered, detail),
    })
}

fn not_here(wrap: Wrap) -> Failure {
    let mechanism = match wrap.mechanism {
        How::AesGcm => "AES-GCM",
        How::AesKwp => "AES-KWP",
        How::AesCbcHmac => "AES-CBC with HMAC",
        How::RsaOaepHmac => "RSA-OAEP with HMAC",
    };
    let iv = match wrap.iv_mode {
        IvMode::None => "without IV",
        IvMode::Caller => "with the caller's IV",
        IvMode::Returned => "with an IV that the token returns",
        IvMode::Appended => "with an IV that the token appends",
    };
    Failure::settled(
        FaultKind::Refused,
        format!(
            "this version does not wrap by {mechanism} {iv}, only by AES-GCM with the caller's IV"
        ),
    )
}

fn seal_gcm(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    aad: &[u8],
    plaintext: &[u8],
    scratch: &mut Scratch,
) -> Result<Vec<u8>, Failure> {
    let mut iv = [0; IV_LEN];
    place.module.random(place.session, &mut iv)?;
    // One IV used twice under one key gives the key's authentication away (SP 800-38D appendix A).
    if iv == [0; IV_LEN] || iv == scratch.last_iv {
        return Err(Failure::Broken {
            function: "C_GenerateRandom",
            detail: "it gives the same bytes again".to_owned(),
        });
    }
    scratch.last_iv = iv;
    let (aad, input) = load(
        scratch.aad.as_mut_slice(),
        aad,
        &mut scratch.input,
        plaintext,
    )?;
    let mut sealed = vec![0; IV_LEN + plaintext.len() + TAG_LEN + SLACK];
    sealed[..IV_LEN].copy_from_slice(&iv);
    let written = place.module.encrypt(
        place.session,
        Mechanism::Gcm { iv: &mut iv, aad },
        object,
        input,
        &mut sealed[IV_LEN..],
    );
    scratch.input[..plaintext.len()].zeroize();
    let written = written?;
    if iv != sealed[..IV_LEN] || written == plaintext.len() + TAG_LEN + 16 {
        return Err(Failure::settled(
            FaultKind::Refused,
            "the token does not take our IV for AES-GCM but chooses its own",
        ));
    }
    if written != plaintext.len() + TAG_LEN {
        return Err(Failure::Broken {
            function: "C_Encrypt",
            detail: format!("it gave {written} bytes for {} and a tag", plaintext.len()),
        });
    }
    sealed.truncate(IV_LEN + written);
    Ok(sealed)
}

fn unseal_gcm(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    aad: &[u8],
    sealed: &[u8],
    plaintext_len: usize,
    scratch: &mut Scratch,
) -> Result<Secret, Failure> {
    if plaintext_len == 0
        || plaintext_len > MAX_PLAINTEXT_LEN
        || sealed.len() != IV_LEN + plaintext_len + TAG_LEN
    {
        return Err(tampered(
            None,
            "the sealed part's length does not fit the header's plaintext length",
        ));
    }
    let (iv, ciphertext) = sealed.split_at(IV_LEN);
    let mut iv: [u8; IV_LEN] = iv.try_into().unwrap_or_default();
    let (aad, input) = load(
        scratch.aad.as_mut_slice(),
        aad,
        &mut scratch.input,
        ciphertext,
    )?;
    let written = place.module.decrypt(
        place.session,
        Mechanism::Gcm { iv: &mut iv, aad },
        object,
        input,
        &mut scratch.output,
    );
    let plaintext = match &written {
        Ok(written) if *written == plaintext_len => {
            Ok(Secret::copy_of(&scratch.output[..plaintext_len]))
        }
        Ok(written) => Err(Failure::Broken {
            function: "C_Decrypt",
            detail: format!("it gave {written} bytes for {plaintext_len}"),
        }),
        Err(failure) => Err(failure.clone()),
    };
    // As much as can be plaintext, also when the module claims to have failed.
    scratch.output[..plaintext_len].zeroize();
    plaintext
}

/// Copies AAD and input to where the module may have them.
fn load<'s>(
    aad_room: &'s mut [u8],
    aad: &[u8],
    input_room: &'s mut [u8],
    input: &[u8],
) -> Result<(&'s mut [u8], &'s mut [u8]), Failure> {
    match (
        aad_room.get_mut(..aad.len()),
        input_room.get_mut(..input.len()),
    ) {
        (Some(aad_copy), Some(input_copy)) => {
            aad_copy.copy_from_slice(aad);
            input_copy.copy_from_slice(input);
            Ok((aad_copy, input_copy))
        }
        _ => Err(Failure::settled(
            FaultKind::BadRequest,
            "the request is longer than any envelope",
        )),
    }
}
