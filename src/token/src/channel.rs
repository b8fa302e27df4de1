//! The socket to the daemon: one packet is one message, in either direction.
//!
//! Any thread may receive and any may send: a packet goes whole to one receiver, and there is no
//! dispatcher in between.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use hsm_wire::host::MAX_MESSAGE_LEN;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockType, getsockopt, recv, send, sockopt};
use zeroize::Zeroize;

/// The host's end of the socketpair.
pub(crate) struct Channel(OwnedFd);

/// A receive buffer. What was received is wiped as soon as it is parsed, and on drop.
pub(crate) struct Packet {
    bytes: Box<[u8; MAX_MESSAGE_LEN]>,
    used: usize,
}

/// What came from the daemon.
pub(crate) enum Received<'a> {
    /// One whole packet.
    Packet(&'a [u8]),
    /// The daemon closed its end.
    Closed,
    /// A packet longer than any message.
    TooLong(usize),
}

impl Channel {
    /// Takes over descriptor `fd`, which the daemon left open for this process.
    ///
    /// Fails when it is not a `SOCK_SEQPACKET` socket: then a person started the program.
    pub(crate) fn adopt(fd: RawFd) -> io::Result<Self> {
        // SAFETY: fcntl(2) with F_GETFD only asks whether the number is open.
        if unsafe { nix::libc::fcntl(fd, nix::libc::F_GETFD) } == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it is open (above), it was handed over by number on the command line for this
        // process alone, and this is called once, before anything else opens or owns descriptors.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        if getsockopt(&fd, sockopt::SockType)? != SockType::SeqPacket {
            // Not ours to close.
            std::mem::forget(fd);
            return Err(io::Error::from(Errno::EPROTOTYPE));
        }
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
        Ok(Self(fd))
    }

    /// The lowest number that a descriptor above this one can have.
    pub(crate) fn first_above(&self) -> u32 {
        self.0.as_raw_fd().unsigned_abs() + 1
    }

    /// Waits for the next packet; looks for it for as long as `look` before it blocks.
    pub(crate) fn receive<'a>(
        &self,
        packet: &'a mut Packet,
        look: Duration,
    ) -> io::Result<Received<'a>> {
        packet.wipe();
        // MSG_TRUNC makes the kernel tell the packet's real length, cut off or not.
        let mut flags = MsgFlags::MSG_TRUNC;
        let until = (!look.is_zero() && has_other_cpus()).then(|| Instant::now() + look);
        if until.is_some() {
            flags |= MsgFlags::MSG_DONTWAIT;
        }
        loop {
            return match recv(self.0.as_raw_fd(), &mut packet.bytes[..], flags) {
                Ok(0) => Ok(Received::Closed),
                Ok(n) if n > MAX_MESSAGE_LEN => {
                    packet.used = MAX_MESSAGE_LEN;
                    Ok(Received::TooLong(n))
                }
                Ok(n) => {
                    packet.used = n;
                    Ok(Received::Packet(&packet.bytes[..n]))
                }
                Err(Errno::EAGAIN) => {
                    if until.is_none_or(|until| Instant::now() >= until) {
                        flags -= MsgFlags::MSG_DONTWAIT;
                    }
                    // Whoever would send may need this CPU.
                    thread::yield_now();
                    continue;
                }
                Err(Errno::EINTR) => continue,
                Err(Errno::ECONNRESET) => Ok(Received::Closed),
                Err(error) => Err(error.into()),
            };
        }
    }

    /// Is another packet waiting, or the end?
    pub(crate) fn has_packet(&self) -> bool {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        !matches!(
            recv(self.0.as_raw_fd(), &mut [0; 1], flags),
            Err(Errno::EAGAIN)
        )
    }

    /// Sends one packet.
    pub(crate) fn send(&self, packet: &[u8]) -> io::Result<()> {
        loop {
            return match send(self.0.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL) {
                Ok(_) => Ok(()),
                Err(Errno::EINTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    }

    /// True when the daemon has closed its end, or died.
    pub(crate) fn is_hung_up(&self) -> bool {
        self.poll_hang_up(PollTimeout::ZERO)
    }

    /// Returns when the daemon closes its end, or dies. Packets do not end the wait, nor do they
    /// wake it: poll is asked for nothing but the hang-up.
    pub(crate) fn wait_for_hang_up(&self) {
        while !self.poll_hang_up(PollTimeout::NONE) {}
    }

    fn poll_hang_up(&self, timeout: PollTimeout) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        match poll(&mut fds, timeout) {
            Ok(_) => fds[0].any().unwrap_or(true),
            // Interrupted: ask again. Anything else means the descriptor is unusable.
            Err(error) => error != Errno::EINTR,
        }
    }
}

/// Looking instead of blocking keeps the only CPU from who would send.
fn has_other_cpus() -> bool {
    static OTHERS: OnceLock<bool> = OnceLock::new();
    *OTHERS.get_or_init(|| thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1))
}

impl Packet {
    /// An empty buffer, large enough for every message.
    pub(crate) fn new() -> Self {
        Self {
            bytes: Box::new([0; MAX_MESSAGE_LEN]),
            used: 0,
        }
    }

    /// Wipes what was received last.
    pub(crate) fn wipe(&mut self) {
        self.bytes[..self.used].zeroize();
        self.used = 0;
    }
}

impl Drop for Packet {
    fn drop(&mut self) {
        self.wipe();
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use nix::sys::socket::{AddressFamily, SockFlag, socketpair};

    use super::*;

    fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, kind, None, SockFlag::empty()).expect("socketpair")
    }

    #[test]
    fn a_stream_socket_is_not_taken_for_the_daemon() {
        let (ours, _theirs) = pair(SockType::Stream);
        let raw = ours.into_raw_fd();
        assert!(Channel::adopt(raw).is_err());
    }

    #[test]
    fn the_hang_up_is_seen_although_packets_are_waiting() {
        let (ours, theirs) = pair(SockType::SeqPacket);
        let channel = Channel::adopt(ours.into_raw_fd()).expect("adopt");
        send(theirs.as_raw_fd(), b"unread", MsgFlags::empty()).expect("send");
        assert!(!channel.is_hung_up());
        drop(theirs);
        assert!(channel.is_hung_up());
    }

    #[test]
    fn a_packet_over_the_limit_is_reported_not_cut() {
        let (ours, theirs) = pair(SockType::SeqPacket);
        let channel = Channel::adopt(ours.into_raw_fd()).expect("adopt");
        let long = vec![1; MAX_MESSAGE_LEN + 1];
        send(theirs.as_raw_fd(), &long, MsgFlags::empty()).expect("send");
        let mut packet = Packet::new();
        let received = channel
            .receive(&mut packet, Duration::ZERO)
            .expect("receive");
        assert!(matches!(received, Received::TooLong(n) if n == long.len()));
    }
}
