//! A token with more keys than a message holds.

mod support;

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::Attribute;
use cryptoki::session::UserType;
use cryptoki::types::AuthPin;
use hsm_wire::host::MAX_KEYS;
use support::{Host, PIN, SOFTHSM, SoftHsm, Start, open};

#[test]
fn keys_beyond_what_a_message_holds_are_counted_and_the_others_listed_in_order() {
    let token = SoftHsm::without_key();
    // SAFETY: the only test of this program, and no other thread reads the environment.
    unsafe { std::env::set_var("SOFTHSM2_CONF", token.conf()) };
    let module = Pkcs11::new(SOFTHSM).expect("module");
    module
        .initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))
        .expect("initialize");
    let slot = module.get_slots_with_initialized_token().expect("slots")[0];
    let session = module.open_rw_session(slot).expect("session");
    session
        .login(UserType::User, Some(&AuthPin::new(PIN.into())))
        .expect("login");
    let generate = |label: String, id: Vec<u8>| {
        session
            .generate_key(
                &Mechanism::AesKeyGen,
                &[
                    Attribute::Token(true),
                    Attribute::Sensitive(true),
                    Attribute::Extractable(false),
                    Attribute::Encrypt(true),
                    Attribute::Decrypt(true),
                    Attribute::Sign(true),
                    Attribute::ValueLen(32.into()),
                    Attribute::Label(label.into_bytes()),
                    Attribute::Id(id),
                ],
            )
            .expect("generate");
    };
    let total = MAX_KEYS + 12;
    for n in 0..total {
        generate(
            format!("key-{n:03}-{}", "x".repeat(240)),
            vec![n as u8; 255],
        );
    }
    token.give_away();
    let mut host = Host::open(&Start::for_token(&token), open());
    let description = host.describe();
    let listed = description.keys.len();
    assert!((80..=MAX_KEYS).contains(&listed), "{listed} of long names");
    assert_eq!(usize::from(description.omitted), total - listed);
    let numbers: Vec<&str> = description
        .keys
        .iter()
        .map(|key| &key.key.label[4..7])
        .collect();
    assert!(numbers.is_sorted(), "{numbers:?}");
    assert_eq!(numbers[0], "000");
}
