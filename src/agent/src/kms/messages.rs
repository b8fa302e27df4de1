//! The messages of `v2.KeyManagementService` (k8s.io/kms `apis/v2/api.proto`), and their protobuf.
//!
//! Written out instead of generated for one reason: generated messages derive `Debug` and `Clone`
//! and keep plaintext in ordinary buffers. Here a plaintext goes from the wire straight into a
//! [`Secret`] and from a [`Secret`] straight to the wire.

use std::io;
use std::marker::PhantomData;
use std::sync::Arc;

use bytes::{Buf, BufMut};
use hsm_wire::secret::Secret;
use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field,
};
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// Longest request the face reads, in bytes. The API server's largest legal Decrypt is 1024 bytes of
/// ciphertext, 1024 of key_id, a UUID and up to 32 KiB of annotations, which we never write.
pub(crate) const MAX_REQUEST_LEN: usize = 36 * 1024;

/// A message that can be read off a request.
pub(crate) trait Incoming: Default + Send + 'static {
    /// Takes one length-delimited field; false if the field is not known.
    fn field(&mut self, tag: u32, value: &mut dyn Buf) -> Result<bool, Status>;
}

/// A message that can be written into a response.
pub(crate) trait Outgoing: Send + 'static {
    /// Writes every field that is not empty.
    fn write(&self, out: &mut EncodeBuf<'_>);
}

/// Asks for version, health and key_id.
#[derive(Default)]
pub(crate) struct StatusRequest;

/// Answers [`StatusRequest`].
pub(crate) struct StatusResponse {
    pub(crate) healthz: String,
    pub(crate) key_id: String,
}

/// Asks to seal a seed.
#[derive(Default)]
pub(crate) struct EncryptRequest {
    pub(crate) plaintext: Option<Secret>,
    pub(crate) uid: String,
}

/// Answers [`EncryptRequest`].
pub(crate) struct EncryptResponse {
    pub(crate) ciphertext: Vec<u8>,
    pub(crate) key_id: String,
}

/// Asks to open an envelope.
#[derive(Default)]
pub(crate) struct DecryptRequest {
    pub(crate) ciphertext: Vec<u8>,
    pub(crate) uid: String,
    pub(crate) key_id: String,
    pub(crate) annotations: bool,
}

/// Answers [`DecryptRequest`]. Shared: several requests may have waited for one operation.
pub(crate) struct DecryptResponse {
    pub(crate) plaintext: Arc<Secret>,
}

impl Incoming for StatusRequest {
    fn field(&mut self, _: u32, _: &mut dyn Buf) -> Result<bool, Status> {
        Ok(false)
    }
}

impl Incoming for EncryptRequest {
    fn field(&mut self, tag: u32, value: &mut dyn Buf) -> Result<bool, Status> {
        match tag {
            1 => self.plaintext = Some(Secret::new(take(value))),
            2 => self.uid = text(value, "uid")?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl Incoming for DecryptRequest {
    fn field(&mut self, tag: u32, value: &mut dyn Buf) -> Result<bool, Status> {
        match tag {
            1 => self.ciphertext = take(value),
            2 => self.uid = text(value, "uid")?,
            3 => self.key_id = text(value, "key_id")?,
            4 => {
                self.annotations = true;
                value.advance(value.remaining());
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl Outgoing for StatusResponse {
    fn write(&self, out: &mut EncodeBuf<'_>) {
        put(1, super::API_VERSION.as_bytes(), out);
        put(2, self.healthz.as_bytes(), out);
        put(3, self.key_id.as_bytes(), out);
    }
}

impl Outgoing for EncryptResponse {
    fn write(&self, out: &mut EncodeBuf<'_>) {
        put(1, &self.ciphertext, out);
        put(2, self.key_id.as_bytes(), out);
    }
}

impl Outgoing for DecryptResponse {
    fn write(&self, out: &mut EncodeBuf<'_>) {
        put(1, self.plaintext.expose(), out);
    }
}

fn take(value: &mut dyn Buf) -> Vec<u8> {
    let mut bytes = vec![0; value.remaining()];
    value.copy_to_slice(&mut bytes);
    bytes
}

fn text(value: &mut dyn Buf, field: &'static str) -> Result<String, Status> {
    String::from_utf8(take(value))
        .map_err(|_| Status::invalid_argument(format!("{field} is not UTF-8")))
}

// proto3: a field with its default value is not written.
fn put(tag: u32, value: &[u8], out: &mut EncodeBuf<'_>) {
    if !value.is_empty() {
        encode_key(tag, WireType::LengthDelimited, out);
        encode_varint(value.len() as u64, out);
        out.put_slice(value);
    }
}

fn parse<M: Incoming>(src: &mut impl Buf) -> Result<M, Status> {
    let malformed = |_| Status::invalid_argument("request is not a protobuf message");
    let mut message = M::default();
    while src.has_remaining() {
        let (tag, wire_type) = decode_key(src).map_err(malformed)?;
        if wire_type == WireType::LengthDelimited {
            let len = decode_varint(src).map_err(malformed)?;
            let len = usize::try_from(len)
                .ok()
                .filter(|len| *len <= src.remaining())
                .ok_or_else(|| Status::invalid_argument("request is cut short"))?;
            let mut value = src.take(len);
            message.field(tag, &mut value)?;
            let unread = value.remaining();
            value.advance(unread);
        } else {
            skip_field(wire_type, tag, src, DecodeContext::default()).map_err(malformed)?;
        }
    }
    Ok(message)
}

/// The codec for one method.
pub(crate) struct KmsCodec<I, O>(PhantomData<fn(I) -> O>);

impl<I, O> Default for KmsCodec<I, O> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

/// Messages are below 200 bytes; tonic's default of 8 KiB a direction would be most of a request's
/// memory.
const BUFFERS: fn() -> BufferSettings = || BufferSettings::new(512, 4096);

impl<I: Incoming, O: Outgoing> Codec for KmsCodec<I, O> {
    type Encode = O;
    type Decode = I;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self::default()
    }

    fn decoder(&mut self) -> Self {
        Self::default()
    }
}

impl<I: Incoming, O: Outgoing> Encoder for KmsCodec<I, O> {
    type Item = O;
    type Error = Status;

    fn encode(&mut self, item: O, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.write(out);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BUFFERS()
    }
}

impl<I: Incoming, O: Outgoing> Decoder for KmsCodec<I, O> {
    type Item = I;
    type Error = Status;

    fn decode(&mut self, src: &mut DecodeBuf<'_>) -> Result<Option<I>, Status> {
        parse(src).map(Some)
    }

    fn buffer_settings(&self) -> BufferSettings {
        BUFFERS()
    }
}

// The trait bounds of Codec want it; no I/O happens in a codec over memory.
const _: fn(io::Error) -> Status = Status::from;

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_field(tag: u8, value: &[u8]) -> Vec<u8> {
        [&[tag << 3 | 2, value.len() as u8], value].concat()
    }

    #[test]
    fn a_decrypt_request_is_read_with_unknown_fields_between() {
        let mut message = bytes_field(1, b"envelope");
        message.extend([9 << 3, 0x96, 0x01]); // field 9, varint 150
        message.extend(bytes_field(3, b"key"));
        message.extend(bytes_field(7, b"from a later version"));
        message.extend(bytes_field(2, b"uid"));
        let request: DecryptRequest = parse(&mut &message[..]).unwrap();
        assert_eq!(request.ciphertext, b"envelope");
        assert_eq!(request.key_id, "key");
        assert_eq!(request.uid, "uid");
        assert!(!request.annotations);
    }

    #[test]
    fn a_length_past_the_end_is_refused_before_anything_is_allocated() {
        let message = [1 << 3 | 2, 0xff, 0xff, 0xff, 0xff, 0x0f, b'x'];
        let status = parse::<EncryptRequest>(&mut &message[..]).err().unwrap();
        assert_eq!(status.message(), "request is cut short");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = parse::<EncryptRequest>(&mut &bytes[..]);
            let _ = parse::<DecryptRequest>(&mut &bytes[..]);
            let _ = parse::<StatusRequest>(&mut &bytes[..]);
        }
    }
}
