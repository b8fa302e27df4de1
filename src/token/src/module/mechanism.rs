//! A mechanism with its parameter, as the C interface takes it.

use std::ptr;

use cryptoki_sys::*;

/// A mechanism. The parameters are mutable because some tokens write into them.
pub(crate) enum Mechanism<'a> {
    /// `CKM_AES_GCM`, tag of 128 bits.
    Gcm {
        /// The IV.
        iv: &'a mut [u8],
        /// The additional authenticated data.
        aad: &'a mut [u8],
    },
    /// `CKM_AES_ECB`
    Ecb,
    /// `CKM_AES_CMAC`
    Cmac,
    /// `CKM_AES_CBC_PAD`
    CbcPad {
        /// The IV.
        iv: &'a mut [u8; 16],
    },
    /// `CKM_AES_KEY_WRAP_KWP` with its standard initial value.
    Kwp,
    /// `CKM_AES_KEY_WRAP_PAD`: the number of the same before PKCS#11 3.0, for most.
    KwpByItsOldNumber,
    /// `CKM_SHA256_HMAC`
    Hmac,
    /// `CKM_RSA_PKCS_OAEP`
    Oaep(OaepHash),
}

/// The hash of OAEP and of its mask generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OaepHash {
    /// What is wanted.
    Sha256,
    /// What a token may have only. OAEP does not rest on collisions, where SHA-1 is broken.
    Sha1,
}

impl Mechanism<'_> {
    pub(super) fn with_raw<R>(&mut self, call: impl FnOnce(*mut CK_MECHANISM) -> R) -> R {
        let plain = |mechanism| CK_MECHANISM {
            mechanism,
            pParameter: ptr::null_mut(),
            ulParameterLen: 0,
        };
        match self {
            Self::Gcm { iv, aad } => {
                let mut params = CK_GCM_PARAMS {
                    pIv: iv.as_mut_ptr(),
                    ulIvLen: iv.len() as CK_ULONG,
                    // Luna refuses to decrypt when it is 0.
                    ulIvBits: 8 * iv.len() as CK_ULONG,
                    // Never null, also when empty: SoftHSM before 2.7 crashes on that.
                    pAAD: aad.as_mut_ptr(),
                    ulAADLen: aad.len() as CK_ULONG,
                    ulTagBits: 128,
                };
                call(&mut CK_MECHANISM {
                    mechanism: CKM_AES_GCM,
                    pParameter: (&raw mut params).cast(),
                    ulParameterLen: size_of::<CK_GCM_PARAMS>() as CK_ULONG,
                })
            }
            Self::Ecb => call(&mut plain(CKM_AES_ECB)),
            Self::Cmac => call(&mut plain(CKM_AES_CMAC)),
            Self::CbcPad { iv } => call(&mut CK_MECHANISM {
                mechanism: CKM_AES_CBC_PAD,
                pParameter: iv.as_mut_ptr().cast(),
                ulParameterLen: iv.len() as CK_ULONG,
            }),
            Self::Kwp => call(&mut plain(CKM_AES_KEY_WRAP_KWP)),
            Self::KwpByItsOldNumber => call(&mut plain(CKM_AES_KEY_WRAP_PAD)),
            Self::Hmac => call(&mut plain(CKM_SHA256_HMAC)),
            Self::Oaep(hash) => {
                let (hash, mask) = match hash {
                    OaepHash::Sha256 => (CKM_SHA256, CKG_MGF1_SHA256),
                    OaepHash::Sha1 => (CKM_SHA_1, CKG_MGF1_SHA1),
                };
                let mut params = CK_RSA_PKCS_OAEP_PARAMS {
                    hashAlg: hash,
                    mgf: mask,
                    source: CKZ_DATA_SPECIFIED,
                    pSourceData: ptr::null_mut(),
                    ulSourceDataLen: 0,
                };
                call(&mut CK_MECHANISM {
                    mechanism: CKM_RSA_PKCS_OAEP,
                    pParameter: (&raw mut params).cast(),
                    ulParameterLen: size_of::<CK_RSA_PKCS_OAEP_PARAMS>() as CK_ULONG,
                })
            }
        }
    }
}
