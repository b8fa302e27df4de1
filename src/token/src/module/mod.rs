//! The vendor's module: loaded once, called only here.
//!
//! Each method is one PKCS#11 function, or the two or three that only make sense together, with
//! Rust slices for pointer and length. What a module hands back is checked before use: it may claim
//! more bytes than the buffer has, more objects than the array has, or nothing sensible at all.
//! Of its exports only `C_GetFunctionList` is used, which every version of PKCS#11 has (2.40 §5.4);
//! a broken `C_GetInterface` does no harm.

use std::ffi::c_void;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::path::Path;
use std::ptr;

use cryptoki_sys::*;
use hsm_wire::fault::{Fault, FaultKind};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::failure::{CallError, Failure};

macro_rules! function {
    ($module:expr, $name:ident) => {
        $module.functions.$name.ok_or(CallError {
            function: stringify!($name),
            code: CKR_FUNCTION_NOT_SUPPORTED,
        })?
    };
}

mod mechanism;
mod objects;

pub(crate) use mechanism::{Mechanism, OaepHash};

/// More slots than any module has; a larger number is a lie.
const MAX_SLOTS: usize = 4096;
/// Handles taken from the module per C_FindObjects.
const FIND_CHUNK: usize = 64;
/// The length of an attribute that cannot be told (2.40 §3.1, `(CK_ULONG)-1`).
const CK_UNAVAILABLE_INFORMATION: CK_ULONG = CK_ULONG::MAX;

/// A loaded module.
pub(crate) struct Module {
    functions: CK_FUNCTION_LIST,
    // Never unloaded: its threads and exit handlers would run into unmapped code.
    _library: ManuallyDrop<Library>,
}

/// How a module may be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threading {
    /// From any number of threads at once.
    Parallel,
    /// From one thread at a time: it cannot lock.
    Serial,
}

impl Module {
    /// Loads the shared object and asks for its functions.
    pub(crate) fn load(path: &Path) -> Result<Self, Fault> {
        let fault = |detail: String| Fault::new(FaultKind::ModuleLoad, detail);
        // RTLD_NOW: a missing symbol is an error here and not a crash at the first use.
        // SAFETY: runs the module's constructors, which is what this process is for. It is isolated
        // and holds no secret yet but the PIN.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
            .map_err(|error| fault(format!("cannot load the module: {error}")))?;
        let library = ManuallyDrop::new(library);
        // SAFETY: PKCS#11 2.40 §5.4 gives C_GetFunctionList this signature in every module.
        let get_function_list = unsafe {
            library.get::<unsafe extern "C" fn(*mut *mut CK_FUNCTION_LIST) -> CK_RV>(
                b"C_GetFunctionList\0",
            )
        }
        .map_err(|_| {
            fault(format!(
                "`{}` has no C_GetFunctionList: it is no PKCS#11 module",
                path.display()
            ))
        })?;
        let mut list = ptr::null_mut();
        // SAFETY: it takes a pointer to a pointer that it sets (2.40 §5.4).
        let code = unsafe { get_function_list(&mut list) };
        CallError::check("C_GetFunctionList", code).map_err(|error| {
            error.fault(
                FaultKind::ModuleLoad,
                format!("`{}` does not give its functions", path.display()),
            )
        })?;
        if list.is_null() || !list.is_aligned() {
            return Err(fault(format!(
                "C_GetFunctionList of `{}` gives no list",
                path.display()
            )));
        }
        // SAFETY: 2.40 §5.4: the pointer is to the library's CK_FUNCTION_LIST, which stays valid; it
        // is not null and aligned (above). Its entries are plain pointers, null where absent, which
        // `Option` represents.
        let functions = unsafe { ptr::read(list) };
        if functions.version.major < 2 {
            return Err(fault(format!(
                "`{}` speaks PKCS#11 {}.{}, this host 2.0 or later",
                path.display(),
                functions.version.major,
                functions.version.minor
            )));
        }
        Ok(Self {
            functions,
            _library: library,
        })
    }

    /// `C_Initialize`, for use from several threads if the module can lock.
    pub(crate) fn initialize(&self) -> Result<Threading, CallError> {
        let initialize = function!(self, C_Initialize);
        let mut args = CK_C_INITIALIZE_ARGS {
            CreateMutex: None,
            DestroyMutex: None,
            LockMutex: None,
            UnlockMutex: None,
            flags: CKF_OS_LOCKING_OK,
            pReserved: ptr::null_mut(),
        };
        // SAFETY: 2.40 §5.4: the argument points to a CK_C_INITIALIZE_ARGS whose four function
        // pointers are all null and whose pReserved is null; it is read during the call only.
        let code = unsafe { initialize((&raw mut args).cast()) };
        match CallError::check("C_Initialize", code) {
            Ok(()) => Ok(Threading::Parallel),
            // Another library in this process has done it. Nothing is wrong with that.
            Err(error) if error.code == CKR_CRYPTOKI_ALREADY_INITIALIZED => Ok(Threading::Parallel),
            Err(error) if error.code == CKR_CANT_LOCK => {
                // SAFETY: 2.40 §5.4: a null argument means that the library is used by one thread.
                let code = unsafe { initialize(ptr::null_mut()) };
                CallError::check("C_Initialize", code).map(|()| Threading::Serial)
            }
            Err(error) => Err(error),
        }
    }

    /// `C_Finalize`. No other call may be under way: the caller holds the gate for writing.
    pub(crate) fn finalize(&self) -> Result<(), CallError> {
        let finalize = function!(self, C_Finalize);
        // SAFETY: 2.40 §5.4: pReserved is null; no other thread is inside the library (above).
        CallError::check("C_Finalize", unsafe { finalize(ptr::null_mut()) })
    }

    /// The slots that hold a token.
    pub(crate) fn slots_with_token(&self) -> Result<Vec<CK_SLOT_ID>, Failure> {
        let get_slot_list = function!(self, C_GetSlotList);
        let mut count: CK_ULONG = 0;
        // SAFETY: 2.40 §5.5: with a null list it only writes the count. It also is what makes the
        // library look for tokens anew.
        let code = unsafe { get_slot_list(CK_TRUE, ptr::null_mut(), &mut count) };
        CallError::check("C_GetSlotList", code)?;
        // A slot may appear between the calls; a few spare places save another round.
        let room = bounded("C_GetSlotList", count, MAX_SLOTS)? + 4;
        let mut slots = vec![0; room];
        let mut count = room as CK_ULONG;
        // SAFETY: 2.40 §5.5: the list has room for `count` ids.
        let code = unsafe { get_slot_list(CK_TRUE, slots.as_mut_ptr(), &mut count) };
        CallError::check("C_GetSlotList", code)?;
        slots.truncate(bounded("C_GetSlotList", count, room)?);
        Ok(slots)
    }

    /// `C_GetTokenInfo`
    pub(crate) fn token_info(&self, slot: CK_SLOT_ID) -> Result<CK_TOKEN_INFO, CallError> {
        let get_token_info = function!(self, C_GetTokenInfo);
        let mut info = MaybeUninit::<CK_TOKEN_INFO>::zeroed();
        // SAFETY: 2.40 §5.5: pInfo receives the token information; it is large enough.
        let code = unsafe { get_token_info(slot, info.as_mut_ptr()) };
        CallError::check("C_GetTokenInfo", code)?;
        // SAFETY: integers and byte arrays only; all-zero is a value, whatever the module wrote too.
        Ok(unsafe { info.assume_init() })
    }

    /// `C_OpenSession`, read-only: nothing here changes the token.
    pub(crate) fn open_session(&self, slot: CK_SLOT_ID) -> Result<CK_SESSION_HANDLE, CallError> {
        let open_session = function!(self, C_OpenSession);
        let mut session = 0;
        // SAFETY: 2.40 §5.6: without application data and callback both pointers may be null; the
        // last receives the handle.
        let code = unsafe {
            open_session(
                slot,
                CKF_SERIAL_SESSION,
                ptr::null_mut(),
                None,
                &mut session,
            )
        };
        CallError::check("C_OpenSession", code).map(|()| session)
    }

    /// `C_CloseSession`. Its failure means that there is nothing to close.
    pub(crate) fn close_session(&self, session: CK_SESSION_HANDLE) {
        if let Some(close_session) = self.functions.C_CloseSession {
            // SAFETY: 2.40 §5.6: takes a handle; one that is not valid is an error code.
            unsafe { close_session(session) };
        }
    }

    /// The state of a session: `CKS_*`.
    pub(crate) fn session_state(&self, session: CK_SESSION_HANDLE) -> Result<CK_STATE, CallError> {
        let get_session_info = function!(self, C_GetSessionInfo);
        let mut info = CK_SESSION_INFO {
            slotID: 0,
            state: 0,
            flags: 0,
            ulDeviceError: 0,
        };
        // SAFETY: 2.40 §5.6: pInfo receives the session information; it is large enough.
        let code = unsafe { get_session_info(session, &mut info) };
        CallError::check("C_GetSessionInfo", code).map(|()| info.state)
    }

    /// `C_Login` as the normal user.
    pub(crate) fn login(
        &self,
        session: CK_SESSION_HANDLE,
        pin: &mut [u8],
    ) -> Result<(), CallError> {
        let login = function!(self, C_Login);
        let len = pin.len() as CK_ULONG;
        // SAFETY: 2.40 §5.6: pPin points to ulPinLen bytes, read during the call.
        let code = unsafe { login(session, CKU_USER, pin.as_mut_ptr(), len) };
        CallError::check("C_Login", code)
    }

    /// `C_FindObjectsInit`, `C_FindObjects`, `C_FindObjectsFinal`: at most `limit` objects that have
    /// all these attributes.
    pub(crate) fn find(
        &self,
        session: CK_SESSION_HANDLE,
        wanted: &[(CK_ATTRIBUTE_TYPE, &[u8])],
        limit: usize,
    ) -> Result<Vec<CK_OBJECT_HANDLE>, Failure> {
        let init = function!(self, C_FindObjectsInit);
        let find = function!(self, C_FindObjects);
        let finish = function!(self, C_FindObjectsFinal);
        let mut values: Vec<Vec<u8>> = wanted.iter().map(|(_, value)| value.to_vec()).collect();
        let mut template: Vec<CK_ATTRIBUTE> = wanted
            .iter()
            .zip(&mut values)
            .map(|((kind, _), value)| CK_ATTRIBUTE {
                type_: *kind,
                pValue: value.as_mut_ptr().cast(),
                ulValueLen: value.len() as CK_ULONG,
            })
            .collect();
        let count = template.len() as CK_ULONG;
        // SAFETY: 2.40 §5.7: pTemplate points to ulCount attributes, each pointing to a value of the
        // length given; `values` outlives the call.
        let code = unsafe { init(session, template.as_mut_ptr(), count) };
        CallError::check("C_FindObjectsInit", code)?;
        let mut objects = Vec::new();
        let outcome = loop {
            let mut chunk = [0; FIND_CHUNK];
            let mut found: CK_ULONG = 0;
            // SAFETY: 2.40 §5.7: the array has room for FIND_CHUNK handles, the count is written.
            let code = unsafe {
                find(
                    session,
                    chunk.as_mut_ptr(),
                    FIND_CHUNK as CK_ULONG,
                    &mut found,
                )
            };
            if let Err(error) = CallError::check("C_FindObjects", code) {
                break Err(error.into());
            }
            match bounded("C_FindObjects", found, FIND_CHUNK) {
                Ok(0) => break Ok(()),
                Ok(found) => objects.extend_from_slice(&chunk[..found]),
                Err(broken) => break Err(broken),
            }
            if objects.len() >= limit {
                break Ok(());
            }
        };
        // Also after a failure: the session stays in search otherwise.
        // SAFETY: 2.40 §5.7: takes the session whose search is active.
        unsafe { finish(session) };
        outcome.map(|()| {
            objects.truncate(limit);
            objects
        })
    }

    /// One attribute of an object, copied into `value`: its length, or None when the object does not
    /// have it, does not show it, or has more of it than fits.
    pub(crate) fn attribute(
        &self,
        session: CK_SESSION_HANDLE,
        object: CK_OBJECT_HANDLE,
        kind: CK_ATTRIBUTE_TYPE,
        value: &mut [u8],
    ) -> Result<Option<usize>, Failure> {
        let get_attribute_value = function!(self, C_GetAttributeValue);
        let room = value.len();
        let mut attribute = CK_ATTRIBUTE {
            type_: kind,
            pValue: value.as_mut_ptr().cast::<c_void>(),
            ulValueLen: room as CK_ULONG,
        };
        // SAFETY: 2.40 §5.7: the template has one attribute, whose pValue has ulValueLen bytes.
        let code = unsafe { get_attribute_value(session, object, &mut attribute, 1) };
        match CallError::check("C_GetAttributeValue", code) {
            Ok(()) if attribute.ulValueLen == CK_UNAVAILABLE_INFORMATION => Ok(None),
            Ok(()) => bounded("C_GetAttributeValue", attribute.ulValueLen, room).map(Some),
            Err(error) => match error.code {
                CKR_ATTRIBUTE_TYPE_INVALID | CKR_ATTRIBUTE_SENSITIVE | CKR_BUFFER_TOO_SMALL => {
                    Ok(None)
                }
                _ => Err(error.into()),
            },
        }
    }

    /// `C_GenerateRandom`
    pub(crate) fn random(
        &self,
        session: CK_SESSION_HANDLE,
        out: &mut [u8],
    ) -> Result<(), CallError> {
        let generate_random = function!(self, C_GenerateRandom);
        let len = out.len() as CK_ULONG;
        // SAFETY: 2.40 §5.14: writes ulRandomLen bytes to a buffer of that length.
        let code = unsafe { generate_random(session, out.as_mut_ptr(), len) };
        CallError::check("C_GenerateRandom", code)
    }

    /// `C_EncryptInit` and `C_Encrypt`: the number of bytes in `output`.
    pub(crate) fn encrypt(
        &self,
        session: CK_SESSION_HANDLE,
        mut mechanism: Mechanism<'_>,
        key: CK_OBJECT_HANDLE,
        input: &mut [u8],
        output: &mut [u8],
    ) -> Result<usize, Failure> {
        let init = function!(self, C_EncryptInit);
        let encrypt = function!(self, C_Encrypt);
        // The parameter lives until C_Encrypt is done: tokens that choose the IV write it then.
        mechanism.with_raw(|mechanism| {
            // SAFETY: 2.40 §5.8: pMechanism points to a mechanism whose parameter fits its type.
            let code = unsafe { init(session, mechanism, key) };
            CallError::check("C_EncryptInit", code)?;
            let mut written = output.len() as CK_ULONG;
            // SAFETY: 2.40 §5.8: pData has ulDataLen bytes, pEncryptedData *pulEncryptedDataLen.
            let code = unsafe {
                encrypt(
                    session,
                    input.as_mut_ptr(),
                    input.len() as CK_ULONG,
                    output.as_mut_ptr(),
                    &mut written,
                )
            };
            CallError::check("C_Encrypt", code)?;
            bounded("C_Encrypt", written, output.len())
        })
    }

    /// `C_DecryptInit` and `C_Decrypt`: the number of bytes in `output`.
    pub(crate) fn decrypt(
        &self,
        session: CK_SESSION_HANDLE,
        mut mechanism: Mechanism<'_>,
        key: CK_OBJECT_HANDLE,
        input: &mut [u8],
        output: &mut [u8],
    ) -> Result<usize, Failure> {
        let init = function!(self, C_DecryptInit);
        let decrypt = function!(self, C_Decrypt);
        mechanism.with_raw(|mechanism| {
            // SAFETY: 2.40 §5.9: pMechanism points to a mechanism whose parameter fits its type.
            let code = unsafe { init(session, mechanism, key) };
            CallError::check("C_DecryptInit", code)?;
            let mut written = output.len() as CK_ULONG;
            // SAFETY: 2.40 §5.9: pEncryptedData has ulEncryptedDataLen bytes, pData *pulDataLen.
            let code = unsafe {
                decrypt(
                    session,
                    input.as_mut_ptr(),
                    input.len() as CK_ULONG,
                    output.as_mut_ptr(),
                    &mut written,
                )
            };
            CallError::check("C_Decrypt", code)?;
            bounded("C_Decrypt", written, output.len())
        })
    }

    /// `C_SignInit` and `C_Sign`: the number of bytes in `output`.
    pub(crate) fn sign(
        &self,
        session: CK_SESSION_HANDLE,
        mut mechanism: Mechanism<'_>,
        key: CK_OBJECT_HANDLE,
        input: &mut [u8],
        output: &mut [u8],
    ) -> Result<usize, Failure> {
        let init = function!(self, C_SignInit);
        let sign = function!(self, C_Sign);
        mechanism.with_raw(|mechanism| {
            // SAFETY: 2.40 §5.11: pMechanism points to a mechanism whose parameter fits its type.
            let code = unsafe { init(session, mechanism, key) };
            CallError::check("C_SignInit", code)?;
            let mut written = output.len() as CK_ULONG;
            // SAFETY: 2.40 §5.11: pData has ulDataLen bytes, pSignature *pulSignatureLen.
            let code = unsafe {
                sign(
                    session,
                    input.as_mut_ptr(),
                    input.len() as CK_ULONG,
                    output.as_mut_ptr(),
                    &mut written,
                )
            };
            CallError::check("C_Sign", code)?;
            bounded("C_Sign", written, output.len())
        })
    }
}

/// A number that the module wrote, if it is at most `limit`.
fn bounded(function: &'static str, claimed: CK_ULONG, limit: usize) -> Result<usize, Failure> {
    match usize::try_from(claimed) {
        Ok(claimed) if claimed <= limit => Ok(claimed),
        _ => Err(Failure::Broken {
            function,
            detail: format!("it claims {claimed} where {limit} is the most there can be"),
        }),
    }
}
