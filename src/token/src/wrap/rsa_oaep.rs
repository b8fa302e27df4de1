//! RSA-OAEP, then HMAC: `hash (1) ‖ ciphertext (modulus) ‖ mark (8) ‖ MAC (16)`.
//!
//! Anybody who has the public key can make a ciphertext, so the MAC alone says that it is ours. The
//! first byte tells OAEP's hash: SHA-256, or SHA-1 where the token knows no other.

use cryptoki_sys::{CK_OBJECT_HANDLE, CKR_ARGUMENTS_BAD};
use hsm_wire::envelope::{MAC_LEN, MAC_MARK_LEN};
use hsm_wire::fault::FaultKind;
use hsm_wire::host::KeyRef;
use hsm_wire::secret::Secret;
use zeroize::Zeroize;

use super::{MacKeys, Scratch, load, tampered};
use crate::failure::Failure;
use crate::key::Place;
use crate::module::{Mechanism, OaepHash};

/// The public half, with which the token seals.
pub(crate) struct PublicKey {
    /// On the token.
    pub(crate) object: CK_OBJECT_HANDLE,
    /// Bytes of the modulus.
    pub(crate) modulus_len: usize,
}

pub(super) fn seal(
    place: Place<'_>,
    public: Option<&PublicKey>,
    macs: &MacKeys,
    aad: &[u8],
    plaintext: &[u8],
    scratch: &mut Scratch,
) -> Result<Vec<u8>, Failure> {
    let Some(public) = public else {
        return Err(super::refused(
            "no RSA public key has the same CKA_ID and modulus".to_owned(),
        ));
    };
    let encrypt = |hash, scratch: &mut Scratch| {
        // RFC 8017 section 7.1.1.
        let most = public.modulus_len.saturating_sub(2 * hash_len(hash) + 2);
        if plaintext.len() > most {
            return Err(Failure::settled(
                FaultKind::BadRequest,
                format!(
                    "the key's OAEP takes {most} bytes at most, not {}",
                    plaintext.len()
                ),
            ));
        }
        let (_, input) = load(&mut scratch.aad, &[], &mut scratch.input, plaintext)?;
        let written = place.module.encrypt(
            place.session,
            Mechanism::Oaep(hash),
            public.object,
            input,
            &mut scratch.output,
        );
        scratch.input[..plaintext.len()].zeroize();
        Ok((hash, written?))
    };
    let encrypted = match encrypt(OaepHash::Sha256, scratch) {
        Err(Failure::Call(error)) if error.is_refusal() || error.code == CKR_ARGUMENTS_BAD => {
            encrypt(OaepHash::Sha1, scratch)
        }
        encrypted => encrypted,
    };
    let (hash, written) = encrypted?;
    if written != public.modulus_len {
        return Err(Failure::Broken {
            function: "C_Encrypt",
            detail: format!(
                "it gave {written} bytes for a modulus of {}",
                public.modulus_len
            ),
        });
    }
    let mut sealed = vec![hash_byte(hash)];
    sealed.extend_from_slice(&scratch.output[..written]);
    macs.append(place, aad, &mut sealed, scratch)?;
    Ok(sealed)
}

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
    if sealed.len() <= 1 + MAC_MARK_LEN + MAC_LEN {
        return Err(tampered(None, "the sealed part is cut short"));
    }
    let body = macs.check(place, key, aad, sealed, scratch)?;
    let hash = match body[0] {
        1 => OaepHash::Sha256,
        2 => OaepHash::Sha1,
        other => {
            return Err(super::refused(format!(
                "this version knows no hash {other} for OAEP"
            )));
        }
    };
    let (_, input) = load(&mut scratch.aad, &[], &mut scratch.input, &body[1..])?;
    let written = place.module.decrypt(
        place.session,
        Mechanism::Oaep(hash),
        object,
        input,
        &mut scratch.output,
    );
    scratch.take_plaintext("C_Decrypt", written, plaintext_len)
}

fn hash_len(hash: OaepHash) -> usize {
    match hash {
        OaepHash::Sha256 => 32,
        OaepHash::Sha1 => 20,
    }
}

fn hash_byte(hash: OaepHash) -> u8 {
    match hash {
        OaepHash::Sha256 => 1,
        OaepHash::Sha1 => 2,
    }
}
