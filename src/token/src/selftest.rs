//! Which wrap a key can do: each is tried with bytes of odd lengths and with tampering, best first.
//!
//! Nothing but a test tells. What a token lists is not what it does (SoftHSM lists AES-KWP and gives 48
//! bytes back for 45), and who chooses the IV of AES-GCM is listed nowhere.

use cryptoki_sys::{CK_OBJECT_HANDLE, CKR_ARGUMENTS_BAD, CKR_MECHANISM_PARAM_INVALID};
use hsm_wire::envelope::Wrap;
use hsm_wire::fault::ckr_name;
use hsm_wire::host::{KeyClass, KeyRef, PassedOver};

use crate::failure::Failure;
use crate::key::{Place, find_partners};
use crate::token::Token;
use crate::wrap::{self, Key, OWN_IV, Partners, Scratch, needs_partners};

/// Plaintexts: shorter than a block, one byte more and less than blocks, whole blocks. Odd ones are
/// where tokens have been seen to pad.
const LENGTHS: [usize; 4] = [1, 15, 32, 33];
const AAD: &[u8] = b"talos-hsm self-test v1";

/// What came of it.
#[derive(Clone)]
pub(crate) struct Choice {
    /// The first wrap that passes, or why none does.
    pub(crate) wrap: Result<Wrap, String>,
    /// Those before it.
    pub(crate) passed_over: Vec<PassedOver>,
}

/// Tests a key once per process.
pub(crate) fn choose(
    token: &Token,
    place: Place<'_>,
    class: KeyClass,
    key: &KeyRef,
    object: CK_OBJECT_HANDLE,
    scratch: &mut Scratch,
) -> Result<Choice, Failure> {
    if let Some(known) = token.known_choice(&key.fingerprint) {
        return Ok(known);
    }
    let candidates: &[Wrap] = match class {
        KeyClass::Secret => &[
            Wrap::AES_GCM,
            Wrap::AES_GCM_RETURNED,
            Wrap::AES_GCM_APPENDED,
            Wrap::AES_KWP,
            Wrap::AES_CBC_HMAC,
        ],
        KeyClass::Private => &[Wrap::RSA_OAEP_HMAC],
    };
    let mut passed_over = Vec::new();
    let mut chosen = None;
    let mut settled = true;
    let mut wants_own_iv = false;
    for wrap in candidates {
        let of_its_own = matches!(*wrap, Wrap::AES_GCM_RETURNED | Wrap::AES_GCM_APPENDED);
        if of_its_own && !wants_own_iv {
            continue;
        }
        // Searched for only where a wrap needs them: most keys have a better one.
        let tested = partners(place, class, key, object, *wrap).and_then(|partners| {
            let with = Key {
                key,
                object,
                partners: &partners,
            };
            test(place, &with, *wrap, scratch)
        });
        let reason = match tested {
            Ok(Ok(())) => {
                chosen = Some(*wrap);
                break;
            }
            Ok(Err(reason)) => reason,
            Err(failure) if failure.tells_of_one_key() => {
                wants_own_iv |= *wrap == Wrap::AES_GCM && speaks_of_the_iv(&failure);
                settled &= is_settled(&failure);
                reason(failure)
            }
            Err(failure) => return Err(failure),
        };
        passed_over.push(PassedOver {
            wrap: *wrap,
            reason,
        });
    }
    let wrap = chosen.ok_or_else(|| {
        let reasons = passed_over.iter().map(|PassedOver { wrap, reason }| {
            format!("{}: {reason}", wrap.name().unwrap_or_default())
        });
        reasons.collect::<Vec<_>>().join("; ")
    });
    let choice = Choice { wrap, passed_over };
    // What may pass is tried again by the next Describe.
    if settled {
        token.note_choice(key.fingerprint, choice.clone());
    }
    Ok(choice)
}

fn partners(
    place: Place<'_>,
    class: KeyClass,
    key: &KeyRef,
    object: CK_OBJECT_HANDLE,
    wrap: Wrap,
) -> Result<Partners, Failure> {
    if needs_partners(wrap) {
        find_partners(place, class, key, object)
    } else {
        Ok(Partners::default())
    }
}

/// A token that chooses the IV itself overwrites ours, appends its own, or refuses any that is not
/// zero, by whatever code. Where AES-GCM itself is refused the other manners are not tried.
fn speaks_of_the_iv(failure: &Failure) -> bool {
    match failure {
        Failure::Final(fault) => fault.detail == OWN_IV,
        Failure::Call(error) => {
            ["C_EncryptInit", "C_Encrypt"].contains(&error.function)
                && (!error.is_refusal() || error.code == CKR_MECHANISM_PARAM_INVALID)
        }
        _ => false,
    }
}

fn is_settled(failure: &Failure) -> bool {
    match failure {
        Failure::Call(error) => error.is_refusal() || error.code == CKR_ARGUMENTS_BAD,
        _ => true,
    }
}

fn reason(failure: Failure) -> String {
    match failure {
        Failure::Call(error) => format!("{} answers {}", error.function, ckr_name(error.code)),
        failure => failure.into_fault("seal and unseal test bytes").detail,
    }
}

/// Seals and unseals bytes of several lengths, then changes each part and expects a refusal. The
/// inner error says what the token does wrong.
fn test(
    place: Place<'_>,
    key: &Key<'_>,
    wrap: Wrap,
    scratch: &mut Scratch,
) -> Result<Result<(), String>, Failure> {
    let mut bytes = [0; 33];
    place.module.random(place.session, &mut bytes)?;
    let mut sealed = Vec::new();
    for len in LENGTHS {
        let plaintext = &bytes[..len];
        sealed = wrap::seal(place, key, wrap, AAD, plaintext, scratch)?;
        let back = wrap::unseal(place, key, wrap, AAD, &sealed, len, scratch)?;
        if back.expose() != plaintext {
            return Ok(Err(format!("{len} bytes come back as others")));
        }
    }
    let mut accepts = |aad: &[u8], sealed: &[u8]| {
        wrap::unseal(place, key, wrap, aad, sealed, bytes.len(), scratch).is_ok()
    };
    if accepts(b"talos-hsm self-test v2", &sealed) {
        return Ok(Err("another AAD is accepted".to_owned()));
    }
    // In every wrap's layout these are of different parts: IV or hash, ciphertext, tag or MAC.
    for at in [0, 20, sealed.len() - 1] {
        let mut changed = sealed.clone();
        changed[at] ^= 1;
        if accepts(AAD, &changed) {
            return Ok(Err(format!(
                "a change of byte {at} of {} is accepted",
                sealed.len()
            )));
        }
    }
    Ok(Ok(()))
}
