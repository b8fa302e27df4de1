//! The second key of a wrap that does not authenticate by itself: HMAC-SHA-256, on the token.
//!
//! It is the generic secret that has the same CKA_ID as the wrapping key: what a key's envelopes need
//! is then known without any setting, ten years later too. An envelope carries the *mark* of the key
//! that made its MAC, so that a new one may stand beside the old one that still opens.

use cryptoki_sys::*;
use hsm_wire::envelope::{MAC_LEN, MAC_MARK_LEN};
use hsm_wire::fault::FaultKind;
use hsm_wire::host::KeyRef;

use super::{Scratch, equal, tampered};
use crate::failure::{CallError, Failure};
use crate::key::{Place, name};
use crate::module::Mechanism;

/// What a key's mark is the MAC of. Nothing that is sealed begins with it.
const MARK_OF: &[u8] = b"talos-hsm mac key mark v1";
/// More are not looked at: one is in use, another one was.
const MAX_MAC_KEYS: usize = 8;
const HMAC_LEN: usize = 32;

/// A key for HMAC.
pub(crate) struct MacKey {
    object: CK_OBJECT_HANDLE,
    mark: [u8; MAC_MARK_LEN],
    /// SENSITIVE and not EXTRACTABLE: fit to seal with.
    kept: bool,
}

/// The keys for HMAC beside a wrapping key.
#[derive(Default)]
pub(crate) struct MacKeys(Vec<MacKey>);

impl MacKeys {
    /// Those with the wrapping key's CKA_ID.
    pub(crate) fn find(place: Place<'_>, id: &[u8]) -> Result<Self, Failure> {
        let mut keys = Vec::new();
        if id.is_empty() {
            return Ok(Self(keys));
        }
        let class = CKO_SECRET_KEY.to_ne_bytes();
        for kind in [CKK_GENERIC_SECRET, CKK_SHA256_HMAC] {
            let kind = kind.to_ne_bytes();
            let wanted: [(CK_ATTRIBUTE_TYPE, &[u8]); 4] = [
                (CKA_CLASS, &class),
                (CKA_KEY_TYPE, &kind),
                (CKA_TOKEN, &[CK_TRUE]),
                (CKA_ID, id),
            ];
            for object in place.module.find(place.session, &wanted, MAX_MAC_KEYS)? {
                match mark(place, object) {
                    Ok(mark) => keys.push(MacKey {
                        object,
                        mark,
                        kept: flag(place, object, CKA_SENSITIVE)? == Some(true)
                            && flag(place, object, CKA_EXTRACTABLE)? == Some(false),
                    }),
                    // It is for something else.
                    Err(Failure::Call(error)) if error.is_refusal() => {}
                    Err(failure) => return Err(failure),
                }
            }
        }
        Ok(Self(keys))
    }

    /// Is there any?
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Is there the one that a sealed part names?
    pub(crate) fn has_maker_of(&self, sealed: &[u8]) -> bool {
        let mark = sealed.len().checked_sub(MAC_MARK_LEN + MAC_LEN);
        mark.and_then(|at| sealed[at..].first_chunk())
            .is_some_and(|mark| self.0.iter().any(|key| key.mark == *mark))
    }

    /// Appends mark and MAC to `sealed`.
    pub(super) fn append(
        &self,
        place: Place<'_>,
        aad: &[u8],
        sealed: &mut Vec<u8>,
        scratch: &mut Scratch,
    ) -> Result<(), Failure> {
        let [key] = &self.0[..] else {
            return Err(match self.0.len() {
                0 => super::refused("no key for HMAC has the same CKA_ID".to_owned()),
                n => Failure::settled(
                    FaultKind::KeyAmbiguous,
                    format!("{n} keys for HMAC have the same CKA_ID; give the old ones another"),
                ),
            });
        };
        if !key.kept {
            return Err(super::refused(
                "the key for HMAC can be read (CKA_SENSITIVE, CKA_EXTRACTABLE)".to_owned(),
            ));
        }
        let mac = hmac(place, key.object, aad, sealed, scratch)?;
        sealed.extend_from_slice(&key.mark);
        sealed.extend_from_slice(&mac[..MAC_LEN]);
        Ok(())
    }

    /// What stands before mark and MAC, if they are right.
    pub(super) fn check<'s>(
        &self,
        place: Place<'_>,
        key: &KeyRef,
        aad: &[u8],
        sealed: &'s [u8],
        scratch: &mut Scratch,
    ) -> Result<&'s [u8], Failure> {
        let (body, end) = sealed.split_at(sealed.len() - MAC_MARK_LEN - MAC_LEN);
        let (wanted, mac) = end.split_at(MAC_MARK_LEN);
        let Some(maker) = self.0.iter().find(|key| key.mark == *wanted) else {
            return Err(Failure::settled(
                FaultKind::KeyNotFound,
                format!(
                    "the token has no key for HMAC with the mark {} and the CKA_ID of {}",
                    hsm_wire::identity::hex(wanted),
                    name(key)
                ),
            ));
        };
        let found = hmac(place, maker.object, aad, body, scratch)?;
        if equal(&found[..MAC_LEN], mac) {
            return Ok(body);
        }
        // The handle may have come to mean another key.
        if mark(place, maker.object)? != maker.mark {
            return Err(Failure::Call(CallError {
                function: "C_Sign",
                code: CKR_KEY_HANDLE_INVALID,
            }));
        }
        Err(tampered(
            None,
            "the sealed bytes do not authenticate under this key and header",
        ))
    }
}

fn flag(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    kind: CK_ATTRIBUTE_TYPE,
) -> Result<Option<bool>, Failure> {
    let mut value = [0];
    let len = place
        .module
        .attribute(place.session, object, kind, &mut value)?;
    Ok((len == Some(1)).then_some(value[0] != CK_FALSE))
}

fn mark(place: Place<'_>, object: CK_OBJECT_HANDLE) -> Result<[u8; MAC_MARK_LEN], Failure> {
    let mut input = [0; MARK_OF.len()];
    input.copy_from_slice(MARK_OF);
    let full = sign(place, object, &mut input)?;
    let mut mark = [0; MAC_MARK_LEN];
    mark.copy_from_slice(&full[..MAC_MARK_LEN]);
    Ok(mark)
}

fn hmac(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    aad: &[u8],
    body: &[u8],
    scratch: &mut Scratch,
) -> Result<[u8; HMAC_LEN], Failure> {
    let len = aad.len() + body.len();
    let Some(input) = scratch.mac.get_mut(..len) else {
        return Err(super::too_long());
    };
    input[..aad.len()].copy_from_slice(aad);
    input[aad.len()..].copy_from_slice(body);
    sign(place, object, input)
}

fn sign(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    input: &mut [u8],
) -> Result<[u8; HMAC_LEN], Failure> {
    let mut image = [0; 64];
    let written = place
        .module
        .sign(place.session, Mechanism::Hmac, object, input, &mut image)?;
    match image[..written].try_into() {
        Ok(mac) => Ok(mac),
        Err(_) => Err(Failure::Broken {
            function: "C_Sign",
            detail: format!("it gave {written} bytes for an HMAC-SHA-256"),
        }),
    }
}
