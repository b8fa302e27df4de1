//! A KMS v2 client as kube-apiserver is one: one HTTP/2 connection, authority `localhost`, a `grpc-timeout` on every call.
//!
//! It stands directly on h2, the layer below hyper and tonic, since generator and server share the machine's cores and
//! every microsecond spent here hides a difference between the servers.

use std::path::Path;

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderMap, HeaderValue, Request, Uri, Version};
use prost::Message;
use tokio::net::UnixStream;

use crate::error::BenchError;
use crate::messages::{
    DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse, StatusRequest, StatusResponse,
};

/// kube-apiserver's default `timeout:` of a KMS provider.
const TIMEOUT: &str = "3S";

#[derive(Clone)]
pub(crate) struct Client {
    requests: SendRequest<Bytes>,
}

impl Client {
    pub(crate) async fn connect(socket: &Path) -> Result<Self, BenchError> {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|source| BenchError::File {
                doing: "connect to",
                path: socket.to_owned(),
                source,
            })?;
        let (requests, connection) = h2::client::handshake(stream)
            .await
            .map_err(BenchError::Http2)?;
        // Its error reaches whoever waits for an answer.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Self { requests })
    }

    pub(crate) async fn status(&self) -> Result<StatusResponse, BenchError> {
        self.call(
            "Status",
            "/v2.KeyManagementService/Status",
            &StatusRequest {},
        )
        .await
    }

    pub(crate) async fn encrypt(
        &self,
        request: &EncryptRequest,
    ) -> Result<EncryptResponse, BenchError> {
        self.call("Encrypt", "/v2.KeyManagementService/Encrypt", request)
            .await
    }

    pub(crate) async fn decrypt(
        &self,
        request: &DecryptRequest,
    ) -> Result<DecryptResponse, BenchError> {
        self.call("Decrypt", "/v2.KeyManagementService/Decrypt", request)
            .await
    }

    async fn call<Answer: Message + Default>(
        &self,
        method: &'static str,
        path: &'static str,
        message: &impl Message,
    ) -> Result<Answer, BenchError> {
        let mut requests = self
            .requests
            .clone()
            .ready()
            .await
            .map_err(BenchError::Http2)?;
        let (response, mut body) = requests
            .send_request(head(path), false)
            .map_err(BenchError::Http2)?;
        body.send_data(frame(message), true)
            .map_err(BenchError::Http2)?;

        let (head, mut body) = response.await.map_err(BenchError::Http2)?.into_parts();
        let mut received = Bytes::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk.map_err(BenchError::Http2)?;
            body.flow_control()
                .release_capacity(chunk.len())
                .map_err(BenchError::Http2)?;
            received = if received.is_empty() {
                chunk
            } else {
                [received, chunk].concat().into()
            };
        }
        let trailers = body.trailers().await.map_err(BenchError::Http2)?;
        // An error without a message has its status in the header block.
        check_status(method, trailers.as_ref().unwrap_or(&head.headers))?;
        unframe(method, &received)
    }
}

fn head(path: &'static str) -> Request<()> {
    let mut request = Request::new(());
    let mut uri = http::uri::Parts::default();
    uri.scheme = Some(http::uri::Scheme::HTTP);
    uri.authority = Some(http::uri::Authority::from_static("localhost"));
    uri.path_and_query = Some(http::uri::PathAndQuery::from_static(path));
    *request.method_mut() = http::Method::POST;
    *request.version_mut() = Version::HTTP_2;
    // All three parts are there, and nothing else can make it fail.
    *request.uri_mut() = Uri::from_parts(uri).unwrap_or_default();
    let headers = request.headers_mut();
    headers.insert(
        http::header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    headers.insert(http::header::TE, HeaderValue::from_static("trailers"));
    headers.insert(
        http::header::USER_AGENT,
        HeaderValue::from_static("hsm-bench"),
    );
    headers.insert("grpc-timeout", HeaderValue::from_static(TIMEOUT));
    request
}

/// gRPC's length-prefixed message: not compressed, four bytes of length.
fn frame(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut buffer = BytesMut::with_capacity(5 + length);
    buffer.put_u8(0);
    buffer.put_u32(length as u32);
    buffer.put(message.encode_to_vec().as_slice());
    buffer.freeze()
}

fn unframe<Answer: Message + Default>(
    method: &'static str,
    received: &[u8],
) -> Result<Answer, BenchError> {
    let (prefix, message) = received
        .split_first_chunk::<5>()
        .ok_or(BenchError::Message {
            method,
            what: "too short",
        })?;
    let [compressed, length @ ..] = *prefix;
    if compressed != 0 || u32::from_be_bytes(length) as usize != message.len() {
        return Err(BenchError::Message {
            method,
            what: "not one uncompressed message",
        });
    }
    Answer::decode(message).map_err(|_| BenchError::Message {
        method,
        what: "not protobuf of that shape",
    })
}

fn check_status(method: &'static str, trailers: &HeaderMap) -> Result<(), BenchError> {
    let code = trailers
        .get("grpc-status")
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .ok_or(BenchError::Message {
            method,
            what: "no grpc-status",
        })?;
    if code == 0 {
        return Ok(());
    }
    let message = trailers
        .get("grpc-message")
        .and_then(|value| value.to_str().ok())
        .unwrap_or("(no message)");
    Err(BenchError::Status {
        method,
        code,
        message: message.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_reads_back_as_the_message_it_carries() {
        let sent = DecryptResponse {
            plaintext: vec![7; 32],
        };
        assert_eq!(
            unframe::<DecryptResponse>("Decrypt", &frame(&sent)).unwrap(),
            sent
        );
    }

    #[test]
    fn a_cut_frame_is_not_taken_for_an_answer() {
        let whole = frame(&DecryptResponse {
            plaintext: vec![7; 32],
        });
        for length in 0..whole.len() {
            assert!(
                unframe::<DecryptResponse>("Decrypt", &whole[..length]).is_err(),
                "{length} bytes"
            );
        }
    }

    #[test]
    fn requests_name_localhost_as_kube_apiserver_does() {
        let request = head("/v2.KeyManagementService/Status");
        assert_eq!(
            request.uri(),
            "http://localhost/v2.KeyManagementService/Status"
        );
    }

    #[test]
    fn a_failure_carries_the_servers_code_and_words() {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("14"));
        trailers.insert("grpc-message", HeaderValue::from_static("starting"));
        let error = check_status("Status", &trailers).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Status failed with gRPC status 14: starting"
        );
    }
}
