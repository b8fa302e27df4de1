//! Plaintexts as session objects, which AES-KWP wraps and unwraps: `C_WrapKey` takes no bytes.

use std::ptr;

use cryptoki_sys::*;

use super::{Mechanism, Module, bounded};
use crate::failure::{CallError, Failure};

impl Module {
    /// `C_CreateObject`: a generic secret that lives as long as the session and can be wrapped.
    pub(crate) fn import(
        &self,
        session: CK_SESSION_HANDLE,
        value: &mut [u8],
    ) -> Result<CK_OBJECT_HANDLE, Failure> {
        let create_object = function!(self, C_CreateObject);
        let mut template = Readable::new();
        let mut attributes = template.attributes();
        attributes.push(attribute(CKA_VALUE, value));
        let mut object = 0;
        // SAFETY: 2.40 §5.7: pTemplate points to ulCount attributes, each pointing to a value of the
        // length given; the last argument receives the handle.
        let code = unsafe {
            create_object(
                session,
                attributes.as_mut_ptr(),
                attributes.len() as CK_ULONG,
                &mut object,
            )
        };
        CallError::check("C_CreateObject", code)?;
        Ok(object)
    }

    /// `C_WrapKey`: the number of bytes in `output`.
    pub(crate) fn wrap_key(
        &self,
        session: CK_SESSION_HANDLE,
        mut mechanism: Mechanism<'_>,
        wrapping: CK_OBJECT_HANDLE,
        object: CK_OBJECT_HANDLE,
        output: &mut [u8],
    ) -> Result<usize, Failure> {
        let wrap_key = function!(self, C_WrapKey);
        mechanism.with_raw(|mechanism| {
            let mut written = output.len() as CK_ULONG;
            // SAFETY: 2.40 §5.13: pMechanism points to a mechanism whose parameter fits its type,
            // pWrappedKey to *pulWrappedKeyLen bytes.
            let code = unsafe {
                wrap_key(
                    session,
                    mechanism,
                    wrapping,
                    object,
                    output.as_mut_ptr(),
                    &mut written,
                )
            };
            CallError::check("C_WrapKey", code)?;
            bounded("C_WrapKey", written, output.len())
        })
    }

    /// `C_UnwrapKey`: a generic secret that lives as long as the session and can be read.
    pub(crate) fn unwrap_key(
        &self,
        session: CK_SESSION_HANDLE,
        mut mechanism: Mechanism<'_>,
        unwrapping: CK_OBJECT_HANDLE,
        wrapped: &mut [u8],
    ) -> Result<CK_OBJECT_HANDLE, Failure> {
        let unwrap_key = function!(self, C_UnwrapKey);
        let mut template = Readable::new();
        let mut attributes = template.attributes();
        mechanism.with_raw(|mechanism| {
            let mut object = 0;
            // SAFETY: 2.40 §5.13: pMechanism points to a mechanism whose parameter fits its type,
            // pWrappedKey to ulWrappedKeyLen bytes, pTemplate to ulAttributeCount attributes, each
            // pointing to a value of the length given; the last argument receives the handle.
            let code = unsafe {
                unwrap_key(
                    session,
                    mechanism,
                    unwrapping,
                    wrapped.as_mut_ptr(),
                    wrapped.len() as CK_ULONG,
                    attributes.as_mut_ptr(),
                    attributes.len() as CK_ULONG,
                    &mut object,
                )
            };
            CallError::check("C_UnwrapKey", code)?;
            Ok(object)
        })
    }

    /// `C_DestroyObject`. Where it fails the session's end does it.
    pub(crate) fn destroy(&self, session: CK_SESSION_HANDLE, object: CK_OBJECT_HANDLE) {
        if let Some(destroy_object) = self.functions.C_DestroyObject {
            // SAFETY: 2.40 §5.7: takes handles; one that is not valid is an error code.
            unsafe { destroy_object(session, object) };
        }
    }
}

/// The attributes of a generic secret that is made to be read again.
struct Readable {
    class: [u8; size_of::<CK_ULONG>()],
    kind: [u8; size_of::<CK_ULONG>()],
    no: [u8; 1],
    yes: [u8; 1],
}

impl Readable {
    fn new() -> Self {
        Self {
            class: CKO_SECRET_KEY.to_ne_bytes(),
            kind: CKK_GENERIC_SECRET.to_ne_bytes(),
            no: [CK_FALSE],
            yes: [CK_TRUE],
        }
    }

    /// Pointing into `self`.
    fn attributes(&mut self) -> Vec<CK_ATTRIBUTE> {
        let no: *mut u8 = self.no.as_mut_ptr();
        let flag = |kind, value: *mut u8| CK_ATTRIBUTE {
            type_: kind,
            pValue: value.cast(),
            ulValueLen: 1,
        };
        vec![
            attribute(CKA_CLASS, &mut self.class),
            attribute(CKA_KEY_TYPE, &mut self.kind),
            flag(CKA_TOKEN, no),
            flag(CKA_SENSITIVE, no),
            flag(CKA_EXTRACTABLE, self.yes.as_mut_ptr()),
        ]
    }
}

fn attribute(kind: CK_ATTRIBUTE_TYPE, value: &mut [u8]) -> CK_ATTRIBUTE {
    CK_ATTRIBUTE {
        type_: kind,
        pValue: ptr::from_mut(value).cast(),
        ulValueLen: value.len() as CK_ULONG,
    }
}
