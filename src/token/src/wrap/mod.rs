//! Sealing and unsealing, dispatched by the envelope header's [`Wrap`].
//!
//! A pair of mechanism and IV mode that nothing writes is refused by name, never guessed at.

mod cbc_hmac;
mod gcm;
mod kwp;
mod mac;
mod rsa_oaep;

use cryptoki_sys::CK_OBJECT_HANDLE;
use hsm_wire::envelope::{GCM_TAG_LEN, MAX_LEN, MAX_PLAINTEXT_LEN, Mechanism as How, Wrap};
use hsm_wire::fault::FaultKind;
use hsm_wire::host::{KeyClass, KeyRef, MAX_AAD_LEN};
use hsm_wire::secret::Secret;
use zeroize::Zeroize;

use crate::failure::{CallError, Failure};
use crate::key::Place;

pub(crate) use gcm::OWN_IV;
pub(crate) use mac::MacKeys;
pub(crate) use rsa_oaep::PublicKey;

/// Room beyond what is expected, so that a token which appends something (its own IV, in FIPS mode)
/// is seen to do so. Without it the call would only say that the buffer is too small.
const SLACK: usize = 64;
const ROOM: usize = MAX_LEN + SLACK;
const _: () = assert!(MAX_PLAINTEXT_LEN + GCM_TAG_LEN <= MAX_LEN);
const IV_ROOM: usize = 16;

/// A wrapping key's handle and what its wrap needs beside it.
pub(crate) struct Key<'k> {
    /// As the daemon names it.
    pub(crate) key: &'k KeyRef,
    /// Its handle.
    pub(crate) object: CK_OBJECT_HANDLE,
    /// Its partners.
    pub(crate) partners: &'k Partners,
}

/// Objects with the wrapping key's CKA_ID that some wraps need.
#[derive(Default)]
pub(crate) struct Partners {
    /// For HMAC.
    pub(crate) macs: MacKeys,
    /// An RSA key's public half.
    pub(crate) public: Option<PublicKey>,
}

/// The wraps that need [`Partners`].
pub(crate) fn needs_partners(wrap: Wrap) -> bool {
    matches!(wrap, Wrap::AES_CBC_HMAC | Wrap::RSA_OAEP_HMAC)
}

/// What kind of key wraps so.
pub(crate) fn class_of(wrap: Wrap) -> KeyClass {
    match wrap.mechanism {
        How::RsaOaepHmac => KeyClass::Private,
        How::AesGcm | How::AesKwp | How::AesCbcHmac => KeyClass::Secret,
    }
}

/// Buffers of one session thread. Inputs are copied here before each call: a module gets pointers
/// that it may write through, and a second try must not see what the first one left.
pub(crate) struct Scratch {
    aad: [u8; MAX_AAD_LEN],
    input: [u8; ROOM],
    output: [u8; ROOM],
    mac: [u8; MAX_AAD_LEN + ROOM],
    last_iv: [u8; IV_ROOM],
}

impl Scratch {
    /// Empty buffers.
    pub(crate) fn new() -> Self {
        Self {
            aad: [0; MAX_AAD_LEN],
            input: [0; ROOM],
            output: [0; ROOM],
            mac: [0; MAX_AAD_LEN + ROOM],
            last_iv: [0; IV_ROOM],
        }
    }

    /// Fills `iv` with random bytes of the token.
    fn fresh_iv(&mut self, place: Place<'_>, iv: &mut [u8]) -> Result<(), Failure> {
        place.module.random(place.session, iv)?;
        if self.is_fresh(iv) {
            return Ok(());
        }
        Err(Failure::Broken {
            function: "C_GenerateRandom",
            detail: "it gives the same bytes again".to_owned(),
        })
    }

    /// Not the last one again, and not zero. One IV used twice under one key gives the key's
    /// authentication away (SP 800-38D appendix A).
    fn is_fresh(&mut self, iv: &[u8]) -> bool {
        let last = &mut self.last_iv[..iv.len()];
        let fresh = *iv != *last && iv.iter().any(|byte| *byte != 0);
        last.copy_from_slice(iv);
        fresh
    }

    /// The plaintext that a decryption left in `output`, which is wiped.
    fn take_plaintext(
        &mut self,
        function: &'static str,
        written: Result<usize, Failure>,
        plaintext_len: usize,
    ) -> Result<Secret, Failure> {
        let plaintext = match written {
            Ok(written) if written == plaintext_len => {
                Ok(Secret::copy_of(&self.output[..plaintext_len]))
            }
            Ok(written) => Err(Failure::Broken {
                function,
                detail: format!("it gave {written} bytes for {plaintext_len}"),
            }),
            Err(failure) => Err(failure),
        };
        // As much as can be plaintext, also when the module claims to have failed.
        self.output[..plaintext_len].zeroize();
        plaintext
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
    key: &Key<'_>,
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
    let Key {
        object, partners, ..
    } = *key;
    match wrap {
        Wrap::AES_GCM | Wrap::AES_GCM_RETURNED | Wrap::AES_GCM_APPENDED => {
            gcm::seal(place, object, wrap.iv_mode, aad, plaintext, scratch)
        }
        Wrap::AES_KWP => {
            let expected = wrap.sealed_len(plaintext.len() as u32).unwrap_or_default();
            kwp::seal(place, object, aad, plaintext, expected, scratch)
        }
        Wrap::AES_CBC_HMAC => {
            cbc_hmac::seal(place, object, &partners.macs, aad, plaintext, scratch)
        }
        Wrap::RSA_OAEP_HMAC => {
            let public = partners.public.as_ref();
            rsa_oaep::seal(place, public, &partners.macs, aad, plaintext, scratch)
        }
        other => Err(not_here(other)),
    }
}

/// The plaintext of a sealed part, which must have `plaintext_len` bytes.
///
/// A failure of the decryption itself is reported as the call's error: whether it means that the
/// data does not authenticate is the caller's to find out (see [`crate::session`]).
pub(crate) fn unseal(
    place: Place<'_>,
    key: &Key<'_>,
    wrap: Wrap,
    aad: &[u8],
    sealed: &[u8],
    plaintext_len: usize,
    scratch: &mut Scratch,
) -> Result<Secret, Failure> {
    if wrap.name().is_none() {
        return Err(not_here(wrap));
    }
    let announced = wrap.sealed_len(u32::try_from(plaintext_len).unwrap_or(u32::MAX));
    if plaintext_len == 0
        || plaintext_len > MAX_PLAINTEXT_LEN
        || announced.is_some_and(|announced| sealed.len() != announced)
    {
        return Err(tampered(
            None,
            "the sealed part's length does not fit the header's plaintext length",
        ));
    }
    let object = key.object;
    let macs = &key.partners.macs;
    match wrap {
        Wrap::AES_KWP => kwp::unseal(place, object, aad, sealed, plaintext_len, scratch),
        Wrap::AES_CBC_HMAC => cbc_hmac::unseal(
            place,
            object,
            key.key,
            macs,
            aad,
            sealed,
            plaintext_len,
            scratch,
        ),
        Wrap::RSA_OAEP_HMAC => rsa_oaep::unseal(
            place,
            object,
            key.key,
            macs,
            aad,
            sealed,
            plaintext_len,
            scratch,
        ),
        gcm => gcm::unseal(place, object, gcm, aad, sealed, plaintext_len, scratch),
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
    refused(format!(
        "this version does not wrap by {:?} with IV mode {:?}",
        wrap.mechanism, wrap.iv_mode
    ))
}

fn refused(detail: String) -> Failure {
    Failure::settled(FaultKind::Refused, detail)
}

fn too_long() -> Failure {
    Failure::settled(
        FaultKind::BadRequest,
        "the request is longer than any envelope",
    )
}

/// Compares without telling by its time where the two differ.
fn equal(a: &[u8], b: &[u8]) -> bool {
    let differing = a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b));
    a.len() == b.len() && std::hint::black_box(differing) == 0
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
        _ => Err(too_long()),
    }
}
