//! Kryoptic as a PKCS#11 module.
//!
//! `kryoptic-lib` is made to be embedded and has no C entry point; this is the one that every PKCS#11
//! client asks for first, and hsm-token needs no other.

use kryoptic_lib::fns::general::fn_get_function_list;
use kryoptic_lib::pkcs11::{CK_FUNCTION_LIST_PTR_PTR, CK_RV};

/// PKCS#11 2.40 section 5.4.
///
/// # Safety
///
/// `list` points to a pointer that may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetFunctionList(list: CK_FUNCTION_LIST_PTR_PTR) -> CK_RV {
    fn_get_function_list(list)
}
