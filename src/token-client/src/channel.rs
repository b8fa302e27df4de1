//! The daemon's end of the socketpair: one message per packet, never blocking.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use hsm_wire::host::MAX_MESSAGE_LEN;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, send, setsockopt, shutdown,
    socketpair, sockopt,
};
use tokio::net::unix::pipe;
use zeroize::Zeroizing;

/// Both ends of a new channel. Neither is inherited by accident, and the host's end blocks: its
/// session threads wait on it.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let ends = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    Ok(ends)
}

/// The daemon's end.
///
/// tokio has no type for sequenced packets. Its pipe ends serve: what they add to a descriptor is
/// that they wait for readiness, each for its own direction only. That is the point: a descriptor
/// that is registered for writing as well wakes the daemon a second time in every operation, when
/// the host takes the packet, and a wake-up costs more than all else that is done here.
pub(crate) struct Channel(pipe::Receiver);

impl Channel {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        // One message of the longest kind must always fit, or waiting for room would never end. The
        // kernel doubles the value for its own bookkeeping.
        setsockopt(&fd, sockopt::SndBuf, &(4 * MAX_MESSAGE_LEN))?;
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        pipe::Receiver::from_owned_fd_unchecked(fd).map(Self)
    }

    /// Sends from where the caller stands, without a turn through the runtime.
    pub(crate) fn try_send(&self, packet: &[u8]) -> io::Result<()> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        send(self.0.as_raw_fd(), packet, flags)?;
        Ok(())
    }

    /// Sends as soon as there is room.
    pub(crate) async fn send(&self, packet: &[u8]) -> io::Result<()> {
        loop {
            match self.try_send(packet) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable().await?,
                done => return done,
            }
        }
    }

    /// Returns when there is room for a packet.
    pub(crate) async fn writable(&self) -> io::Result<()> {
        // Registered for as long as somebody waits: a full socket is rare.
        let twin = self.0.as_fd().try_clone_to_owned()?;
        pipe::Sender::from_owned_fd_unchecked(twin)?
            .writable()
            .await
    }

    /// Is there something to receive, an end included?
    pub(crate) fn has_packet(&self) -> bool {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        !matches!(
            recv(self.0.as_raw_fd(), &mut [0; 1], flags),
            Err(Errno::EAGAIN)
        )
    }

    /// Tells the host that nothing more comes, whoever else still holds this end.
    pub(crate) fn close(&self) {
        // It fails only on a socket that is closed already.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }

    /// One packet, or none when the host has closed its end.
    pub(crate) async fn recv<'a>(
        &self,
        buffer: &'a mut Buffer,
    ) -> io::Result<Option<&'a mut [u8]>> {
        let n = loop {
            self.0.readable().await?;
            match self.0.try_read(&mut buffer.0) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                done => break done?,
            }
        };
        if n > MAX_MESSAGE_LEN {
            let text = format!("a message over the limit of {MAX_MESSAGE_LEN} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok((n > 0).then(|| &mut buffer.0[..n]))
    }
}

/// Room for one packet, and a byte more that tells one over the limit; wiped at the end. Who receives a plaintext wipes it sooner.
pub(crate) struct Buffer(Zeroizing<Vec<u8>>);

impl Buffer {
    pub(crate) fn new() -> Self {
        Self(Zeroizing::new(vec![0; MAX_MESSAGE_LEN + 1]))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn channels() -> (Channel, Channel) {
        let (a, b) = pair().unwrap();
        (Channel::new(a).unwrap(), Channel::new(b).unwrap())
    }

    #[tokio::test]
    async fn packets_keep_their_boundaries_and_the_end_is_seen() {
        let (a, b) = channels();
        a.send(b"one").await.unwrap();
        a.send(&vec![7; MAX_MESSAGE_LEN]).await.unwrap();
        drop(a);
        let mut buffer = Buffer::new();
        assert_eq!(b.recv(&mut buffer).await.unwrap().unwrap(), b"one");
        let long = b.recv(&mut buffer).await.unwrap().unwrap();
        assert_eq!(long.len(), MAX_MESSAGE_LEN);
        assert!(b.recv(&mut buffer).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_packet_over_the_limit_is_an_error() {
        let (a, b) = channels();
        a.send(&vec![7; MAX_MESSAGE_LEN + 1]).await.unwrap();
        let error = b.recv(&mut Buffer::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_full_socket_is_waited_for() {
        let (a, b) = channels();
        let mut sent = 0u32;
        while a.try_send(&[0; 1024]).is_ok() {
            sent += 1;
        }
        let waiting = tokio::time::timeout(Duration::from_millis(20), a.writable()).await;
        assert!(waiting.is_err(), "it is full");
        let receive = async {
            let mut buffer = Buffer::new();
            for _ in 0..sent {
                b.recv(&mut buffer).await.unwrap().unwrap();
            }
        };
        tokio::join!(receive, async { a.writable().await.unwrap() });
        a.try_send(b"more").unwrap();
    }
}
