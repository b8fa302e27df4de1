//! Reader and writer: limits come before bytes, and nothing is read twice or past the end.

use hsm_wire::cursor::{MalformedError, Reader, Writer};
use proptest::prelude::*;

#[test]
fn a_length_over_the_limit_is_refused_even_when_the_bytes_are_there() {
    let mut writer = Writer::default();
    writer.bytes(&[1; 11]);
    let message = writer.finish();
    assert_eq!(
        Reader::new(&message).bytes(10, "name"),
        Err(MalformedError::Limit("name"))
    );
    assert_eq!(Reader::new(&message).bytes(11, "name"), Ok(&[1; 11][..]));
}

#[test]
fn a_length_that_exceeds_the_message_is_truncated_and_costs_no_memory() {
    let message = [0xff, 0xff, 1];
    let read = Reader::new(&message).bytes(usize::MAX, "name");
    assert_eq!(read, Err(MalformedError::Truncated("name")));
}

#[test]
fn text_that_is_not_utf_8_has_a_value_that_does_not_exist() {
    let message = [0, 1, 0xff];
    assert_eq!(
        Reader::new(&message).text(9, "label"),
        Err(MalformedError::Value("label"))
    );
}

#[test]
fn bytes_behind_the_last_field_are_counted() {
    let mut reader = Reader::new(&[1, 2, 3]);
    assert_eq!(reader.u8("first"), Ok(1));
    assert_eq!(reader.finish(), Err(MalformedError::Trailing(2)));
}

#[test]
fn a_failed_read_takes_nothing() {
    let mut reader = Reader::new(&[1, 2, 3]);
    assert_eq!(
        reader.u32("number"),
        Err(MalformedError::Truncated("number"))
    );
    assert_eq!(reader.rest(), [1, 2, 3]);
    assert_eq!(reader.finish(), Ok(()));
}

#[test]
fn a_byte_string_longer_than_its_length_field_is_cut_to_what_can_be_read_back() {
    let mut writer = Writer::default();
    writer.bytes(&[9; 70_000]);
    let message = writer.finish();
    let mut reader = Reader::new(&message);
    assert_eq!(
        reader.bytes(usize::MAX, "long").map(<[u8]>::len),
        Ok(65_535)
    );
    assert_eq!(reader.finish(), Ok(()));
}

#[test]
fn errors_say_which_field() {
    let said = [
        MalformedError::Truncated("AAD"),
        MalformedError::Trailing(3),
        MalformedError::Value("AAD"),
        MalformedError::Limit("AAD"),
    ]
    .map(|error| error.to_string());
    assert_eq!(
        said,
        [
            "message ends inside AAD",
            "3 bytes follow the last field",
            "AAD has a value that does not exist",
            "AAD is over its limit",
        ]
    );
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        a in any::<u8>(),
        b in any::<u16>(),
        c in any::<u32>(),
        d in any::<u64>(),
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        text in ".{0,80}",
        rest in any::<[u8; 5]>(),
    ) {
        let mut writer = Writer::with_capacity(8);
        writer.u8(a).u16(b).u32(c).u64(d).bytes(&bytes).bytes(text.as_bytes()).put(&rest);
        let message = writer.finish();
        let mut reader = Reader::new(&message);
        prop_assert_eq!(reader.u8("a"), Ok(a));
        prop_assert_eq!(reader.u16("b"), Ok(b));
        prop_assert_eq!(reader.u32("c"), Ok(c));
        prop_assert_eq!(reader.u64("d"), Ok(d));
        prop_assert_eq!(reader.bytes(300, "bytes"), Ok(&bytes[..]));
        prop_assert_eq!(reader.text(320, "text"), Ok(text));
        prop_assert_eq!(reader.array::<5>("rest"), Ok(rest));
        prop_assert_eq!(reader.finish(), Ok(()));
    }

    #[test]
    fn no_length_field_makes_a_read_exceed_its_limit(
        message in proptest::collection::vec(any::<u8>(), 0..64),
        limit in 0..40usize,
    ) {
        if let Ok(bytes) = Reader::new(&message).bytes(limit, "field") {
            prop_assert!(bytes.len() <= limit);
        }
    }
}
