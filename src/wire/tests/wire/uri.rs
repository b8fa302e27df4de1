//! PKCS#11 URIs: the examples of RFC 7512 §3, every error, and parse ∘ display = identity.

use hsm_wire::host::TokenInfo;
use hsm_wire::uri::{ObjectType, Uri, UriError, nearest};
use proptest::prelude::*;

fn text(value: &str) -> Option<String> {
    Some(value.to_owned())
}

fn error(uri: &str) -> UriError {
    Uri::parse(uri).expect_err(uri)
}

fn parsed(uri: &str) -> Uri {
    Uri::parse(uri).unwrap_or_else(|error| panic!("{uri}: {error}"))
}

#[test]
fn rfc_7512_public_key_by_label() {
    let expected = Uri {
        object: text("my-pubkey"),
        object_type: Some(ObjectType::Public),
        ..Uri::default()
    };
    assert_eq!(parsed("pkcs11:object=my-pubkey;type=public"), expected);
}

#[test]
fn rfc_7512_certificate_with_every_common_attribute() {
    let uri = "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;\
        manufacturer=Snake%20Oil,%20Inc.;\
        model=1.0;\
        object=my-certificate;\
        type=cert;\
        id=%69%95%3E%5C%F4%BD%EC%91;\
        serial=";
    let expected = Uri {
        token: text("The Software PKCS#11 Softtoken"),
        manufacturer: text("Snake Oil, Inc."),
        model: text("1.0"),
        object: text("my-certificate"),
        object_type: Some(ObjectType::Certificate),
        id: Some(b"\x69\x95\x3e\x5c\xf4\xbd\xec\x91".to_vec()),
        serial: text(""),
        slot_id: None,
    };
    assert_eq!(parsed(uri), expected);
    // As the RFC writes it, the PIN's place follows, and that is not for a URI to say.
    assert_eq!(
        error(&format!("{uri}?pin-source=file:/etc/token_pin")),
        UriError::Query
    );
}

#[test]
fn rfc_7512_percent_sign_and_mixed_case_escapes() {
    let uri =
        parsed("pkcs11:token=My%20token%25%20created%20by%20Joe;id=%01%02%03%Ba%dd%Ca%fe%04%05%06");
    assert_eq!(uri.token, text("My token% created by Joe"));
    assert_eq!(
        uri.id.as_deref(),
        Some(&b"\x01\x02\x03\xba\xdd\xca\xfe\x04\x05\x06"[..])
    );
}

#[test]
fn rfc_7512_an_escaped_escape_is_unescaped_once() {
    let uri = parsed(
        "pkcs11:token=A%20name%20with%20a%20substring%20%253B;object=my-certificate;type=cert",
    );
    assert_eq!(uri.token, text("A name with a substring %3B"));
}

#[test]
fn rfc_7512_a_letter_beyond_ascii() {
    let uri = parsed(
        "pkcs11:token=Name%20with%20a%20small%20A%20with%20acute:%20%C3%A1;object=my-certificate;type=cert",
    );
    assert_eq!(uri.token, text("Name with a small A with acute: á"));
}

#[test]
fn rfc_7512_queries_are_refused_whatever_they_ask() {
    for uri in [
        "pkcs11:object=my-key;type=private?pin-source=file:/etc/token",
        "pkcs11:token=Software%20PKCS%2311%20softtoken;manufacturer=Snake%20Oil,%20Inc.?pin-value=the-pin",
        "pkcs11:object=my-sign-key;type=private?module-name=mypkcs11",
        "pkcs11:object=my-sign-key;type=private?module-path=/mnt/libmypkcs11.so.1",
        "pkcs11:token=my-token;type=cert;vendor-aaa=value-a?pin-source=file:/etc/token_pin&vendor-bbb=value-b",
        "pkcs11:?",
    ] {
        assert_eq!(error(uri), UriError::Query, "{uri}");
    }
}

#[test]
fn rfc_7512_attributes_that_name_no_token_or_key_are_unknown() {
    for (uri, name) in [
        ("pkcs11:slot-description=Sun%20Metaslot", "slot-description"),
        (
            "pkcs11:library-manufacturer=Snake%20Oil,%20Inc.",
            "library-manufacturer",
        ),
        ("pkcs11:token=my-token;vendor-aaa=value-a", "vendor-aaa"),
    ] {
        let expected = UriError::Unknown {
            name: name.to_owned(),
            nearest: None,
        };
        assert_eq!(error(uri), expected);
    }
}

#[test]
fn rfc_7512_the_uri_that_matches_everything_is_refused() {
    assert_eq!(error("pkcs11:"), UriError::Empty);
}

#[test]
fn rfc_7512_every_object_type_is_known() {
    for (name, object_type) in [
        ("public", ObjectType::Public),
        ("private", ObjectType::Private),
        ("cert", ObjectType::Certificate),
        ("secret-key", ObjectType::SecretKey),
        ("data", ObjectType::Data),
    ] {
        assert_eq!(
            parsed(&format!("pkcs11:type={name}")).object_type,
            Some(object_type)
        );
    }
}

#[test]
fn rfc_7512_characters_that_need_no_escape_stand_for_themselves() {
    let plain = "-._~:[]@!$'()*+,=&";
    assert_eq!(parsed(&format!("pkcs11:token={plain}")).token, text(plain));
}

#[test]
fn another_scheme_is_refused() {
    for uri in ["", "pkcs11", "token=a", "file:/etc/pin", " pkcs11:token=a"] {
        assert_eq!(error(uri), UriError::Scheme, "{uri}");
    }
}

#[test]
fn a_misspelt_attribute_is_unknown_and_the_nearest_is_named() {
    let expected = UriError::Unknown {
        name: "objekt".to_owned(),
        nearest: Some("object"),
    };
    assert_eq!(error("pkcs11:objekt=kek"), expected);
    assert_eq!(
        expected.to_string(),
        "unknown attribute `objekt`; did you mean `object`?"
    );
    assert_eq!(
        error("pkcs11:Token=a").to_string(),
        "unknown attribute `Token`; did you mean `token`?"
    );
    assert_eq!(
        error("pkcs11:colour=blue").to_string(),
        "unknown attribute `colour`"
    );
}

#[test]
fn an_attribute_given_twice_is_refused_even_with_the_same_value() {
    for name in ["token", "serial", "manufacturer", "model", "object", "id"] {
        assert_eq!(
            error(&format!("pkcs11:{name}=a;{name}=a")),
            UriError::Twice(name)
        );
    }
    assert_eq!(
        error("pkcs11:slot-id=1;slot-id=1"),
        UriError::Twice("slot-id")
    );
    assert_eq!(error("pkcs11:type=data;type=data"), UriError::Twice("type"));
}

#[test]
fn an_attribute_without_a_value_is_refused() {
    assert_eq!(error("pkcs11:token"), UriError::NoValue("token".to_owned()));
    assert_eq!(error("pkcs11:token=a;"), UriError::NoValue(String::new()));
    assert_eq!(
        error("pkcs11:token=a;;object=b"),
        UriError::NoValue(String::new())
    );
}

#[test]
fn a_bad_or_missing_escape_is_refused() {
    for value in [
        "%", "%4", "%4g", "%g4", "a b", "a/b", "a#b", "á", "a\"b", "%+1", "a\0",
    ] {
        assert_eq!(
            error(&format!("pkcs11:token={value}")),
            UriError::Escape("token"),
            "{value}"
        );
    }
    assert_eq!(error("pkcs11:id=%0"), UriError::Escape("id"));
}

#[test]
fn bytes_that_are_not_utf_8_are_text_nowhere_but_in_an_id() {
    assert_eq!(error("pkcs11:token=%ff"), UriError::NotText("token"));
    assert_eq!(error("pkcs11:object=%c3"), UriError::NotText("object"));
    assert_eq!(parsed("pkcs11:id=%ff").id, Some(vec![0xff]));
}

#[test]
fn a_type_or_slot_that_does_not_exist_is_refused_with_what_may_be_there() {
    assert_eq!(
        error("pkcs11:type=secretkey").to_string(),
        "`secretkey` is no value of `type`; it is one of public, private, cert, secret-key, data"
    );
    for value in ["", "+1", "-1", "0x1", "1 ", "18446744073709551616"] {
        let expected = UriError::Value {
            name: "slot-id",
            value: value.to_owned(),
            expected: "it is a decimal number",
        };
        assert_eq!(error(&format!("pkcs11:slot-id={value}")), expected);
    }
    assert_eq!(
        parsed("pkcs11:slot-id=18446744073709551615").slot_id,
        Some(u64::MAX)
    );
}

#[test]
fn errors_without_details_say_what_to_write() {
    for (error, said) in [
        (UriError::Scheme, "a PKCS#11 URI begins with `pkcs11:`"),
        (
            UriError::Empty,
            "the URI names nothing; give at least one attribute, such as `token=LABEL`",
        ),
        (UriError::Twice("id"), "attribute `id` is given twice"),
        (
            UriError::NoValue("token".to_owned()),
            "`token` is not of the form `attribute=value`",
        ),
        (
            UriError::Escape("id"),
            "the value of `id` has a bad or missing percent-escape",
        ),
        (
            UriError::NotText("token"),
            "the value of `token` is not UTF-8",
        ),
        (
            UriError::Query,
            "query attributes (`?…`) are not taken from a URI; module and PIN have fields of their own in the configuration",
        ),
    ] {
        assert_eq!(error.to_string(), said);
    }
}

#[test]
fn only_object_attributes_name_an_object() {
    for uri in [
        "pkcs11:object=k",
        "pkcs11:id=%01",
        "pkcs11:type=secret-key;token=a",
    ] {
        assert!(parsed(uri).names_object(), "{uri}");
    }
    for uri in [
        "pkcs11:token=a",
        "pkcs11:slot-id=0;serial=1;model=m;manufacturer=f",
    ] {
        assert!(!parsed(uri).names_object(), "{uri}");
    }
}

#[test]
fn a_token_matches_when_every_attribute_given_is_its_own() {
    let token = TokenInfo {
        label: "a".to_owned(),
        serial: "1".to_owned(),
        manufacturer: "f".to_owned(),
        model: "m".to_owned(),
    };
    let matches = |uri: &str, slot| parsed(uri).matches_token(&token, slot);
    assert!(matches(
        "pkcs11:token=a;serial=1;manufacturer=f;model=m;slot-id=3",
        Some(3)
    ));
    assert!(matches("pkcs11:object=anything", None));
    for uri in [
        "pkcs11:token=b",
        "pkcs11:serial=",
        "pkcs11:manufacturer=F",
        "pkcs11:model=mm",
    ] {
        assert!(!matches(uri, None), "{uri}");
    }
    assert!(!matches("pkcs11:token=a;slot-id=3", Some(4)));
    assert!(
        matches("pkcs11:token=a;slot-id=3", None),
        "a slot that is not known is no contradiction"
    );
}

#[test]
fn a_secret_key_matches_by_label_id_and_type() {
    let matches = |uri: &str| parsed(uri).matches_secret_key("kek", &[1]);
    for uri in [
        "pkcs11:token=a",
        "pkcs11:object=kek;id=%01;type=secret-key",
        "pkcs11:id=%01",
    ] {
        assert!(matches(uri), "{uri}");
    }
    for uri in [
        "pkcs11:object=KEK",
        "pkcs11:id=",
        "pkcs11:object=kek;type=private",
    ] {
        assert!(!matches(uri), "{uri}");
    }
}

#[test]
fn the_canonical_text_has_a_fixed_order_and_escapes_what_it_need_not() {
    let uri = parsed("pkcs11:type=secret-key;id=ab;object=k%20k,k;slot-id=007;token=t");
    assert_eq!(
        uri.to_string(),
        "pkcs11:token=t;object=k%20k%2Ck;slot-id=7;id=%61%62;type=secret-key"
    );
}

#[test]
fn nearest_names_nothing_that_is_not_near() {
    assert_eq!(nearest("tokn", ["token", "model"]), Some("token"));
    assert_eq!(nearest("modle", ["token", "model"]), Some("model"));
    assert_eq!(nearest("x", ["token", "model"]), None);
    assert_eq!(nearest("", ["token"]), None);
    assert_eq!(nearest(&"token".repeat(10_000), ["token"]), None);
    assert_eq!(nearest("token", []), None);
}

fn object_type() -> impl Strategy<Value = ObjectType> {
    prop_oneof![
        Just(ObjectType::Public),
        Just(ObjectType::Private),
        Just(ObjectType::Certificate),
        Just(ObjectType::SecretKey),
        Just(ObjectType::Data),
    ]
}

prop_compose! {
    fn uri()(
        texts in proptest::collection::vec(proptest::option::of("\\PC{0,12}|[ -~]{0,12}|.{0,6}"), 5),
        slot_id in proptest::option::of(any::<u64>()),
        id in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..12)),
        object_type in proptest::option::of(object_type()),
    ) -> Uri {
        let mut texts = texts.into_iter();
        let mut next = || texts.next().flatten();
        Uri {
            token: next(),
            serial: next(),
            manufacturer: next(),
            model: next(),
            object: next(),
            slot_id,
            id,
            object_type,
        }
    }
}

proptest! {
    #[test]
    fn what_is_displayed_parses_to_the_same_uri(uri in uri()) {
        prop_assume!(uri != Uri::default());
        prop_assert_eq!(Uri::parse(&uri.to_string()), Ok(uri));
    }

    #[test]
    fn no_text_makes_the_parser_panic(tail in "\\PC{0,60}|([a-z-]{2,12}=[%0-9a-fA-F;?/=]{0,20};?){0,4}") {
        let _ = Uri::parse(&tail);
        if let Ok(uri) = Uri::parse(&format!("pkcs11:{tail}")) {
            // What is canonical stays as it is.
            let canonical = uri.to_string();
            prop_assert_eq!(Uri::parse(&canonical).map(|uri| uri.to_string()), Ok(canonical));
        }
    }
}
