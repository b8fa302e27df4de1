//! An RSA key pair on the token: who it is, and its public half.

use cryptoki_sys::*;
use hsm_wire::fault::FaultKind;
use hsm_wire::identity::Fingerprint;
use sha2::{Digest, Sha256};

use crate::failure::Failure;
use crate::key::Place;
use crate::wrap::PublicKey;

/// Bytes of the longest modulus that is looked at: 8192 bits.
const MAX_MODULUS_LEN: usize = 1024;
/// Public keys with one id that are looked at.
const MAX_NAMESAKES: usize = 16;
/// AlgorithmIdentifier of rsaEncryption with its NULL (RFC 3279 section 2.3.1).
const RSA_ENCRYPTION: [u8; 15] = [
    0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00,
];

/// SHA-256 over the SubjectPublicKeyInfo, as certificates have it.
pub(crate) fn fingerprint(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
) -> Result<Fingerprint, Failure> {
    let (Some(modulus), Some(exponent)) = (
        number(place, object, CKA_MODULUS)?,
        number(place, object, CKA_PUBLIC_EXPONENT)?,
    ) else {
        return Err(Failure::settled(
            FaultKind::Refused,
            "the token does not show modulus and public exponent of the RSA key",
        ));
    };
    Ok(Fingerprint(
        Sha256::digest(spki(&modulus, &exponent)).into(),
    ))
}

/// Bits of the modulus, 0 where the token does not show it.
pub(crate) fn bits(place: Place<'_>, object: CK_OBJECT_HANDLE) -> Result<u16, Failure> {
    let modulus = number(place, object, CKA_MODULUS)?;
    Ok(modulus.map_or(0, |modulus| 8 * modulus.len() as u16))
}

/// The public key of the private key `object`: that with its id and its modulus.
pub(crate) fn find_public(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    id: &[u8],
) -> Result<Option<PublicKey>, Failure> {
    let Some(modulus) = number(place, object, CKA_MODULUS)? else {
        return Ok(None);
    };
    let class = CKO_PUBLIC_KEY.to_ne_bytes();
    let wanted: [(CK_ATTRIBUTE_TYPE, &[u8]); 3] =
        [(CKA_CLASS, &class), (CKA_TOKEN, &[CK_TRUE]), (CKA_ID, id)];
    for object in place.module.find(place.session, &wanted, MAX_NAMESAKES)? {
        if number(place, object, CKA_MODULUS)?.as_ref() == Some(&modulus) {
            return Ok(Some(PublicKey {
                object,
                modulus_len: modulus.len(),
            }));
        }
    }
    Ok(None)
}

/// A big number without leading zeros.
fn number(
    place: Place<'_>,
    object: CK_OBJECT_HANDLE,
    kind: CK_ATTRIBUTE_TYPE,
) -> Result<Option<Vec<u8>>, Failure> {
    let mut value = [0; MAX_MODULUS_LEN];
    let len = place
        .module
        .attribute(place.session, object, kind, &mut value)?;
    Ok(len.and_then(|len| {
        let first = value[..len].iter().position(|byte| *byte != 0)?;
        Some(value[first..len].to_vec())
    }))
}

fn spki(modulus: &[u8], exponent: &[u8]) -> Vec<u8> {
    let numbers = [integer(modulus), integer(exponent)].concat();
    let mut bits = vec![0];
    bits.extend(der(0x30, &numbers));
    der(0x30, &[&RSA_ENCRYPTION[..], &der(0x03, &bits)].concat())
}

fn integer(number: &[u8]) -> Vec<u8> {
    // A set high bit would make it negative.
    if number.first().is_some_and(|first| *first >= 0x80) {
        der(0x02, &[&[0], number].concat())
    } else {
        der(0x02, number)
    }
}

/// One value with tag and length; none here reaches 64 KiB.
fn der(tag: u8, value: &[u8]) -> Vec<u8> {
    let [high, low] = (value.len() as u16).to_be_bytes();
    let mut out = vec![tag];
    match (high, low) {
        (0, low @ ..0x80) => out.push(low),
        (0, low) => out.extend([0x81, low]),
        (high, low) => out.extend([0x82, high, low]),
    }
    out.extend_from_slice(value);
    out
}
