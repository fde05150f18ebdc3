//! Answers of the HTTP layer itself, in the port's own shape.
//!
//! hyper answers what is no request (`400`, `414`, `431`) with a bare head and closes; there is no hook for
//! it. The head is one write, begins with the status line, has `content-length: 0` and no `x-request-id`,
//! which every answer of a route has. A body cannot be taken for it: bodies hold JSON, where a carriage
//! return is escaped.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::options::OwnError;

/// A connection whose bare error answers are replaced.
pub(crate) struct OwnErrors {
    stream: TcpStream,
    own: Option<OwnError>,
    /// What is left of a replacement, and how long what it replaces was.
    replacing: Option<(Bytes, usize)>,
}

impl OwnErrors {
    pub(crate) fn new(stream: TcpStream, own: Option<OwnError>) -> Self {
        Self { stream, own, replacing: None }
    }

    /// Writes the replacement of this buffer, if it is a bare error answer. Says then that the buffer was
    /// written.
    fn replaced(&mut self, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<Option<io::Result<usize>>> {
        if self.replacing.is_none() {
            let Some(own) = &self.own else { return Poll::Ready(None) };
            let Some(answer) = bare_error(buffer).and_then(|status| (own.0)(status)) else {
                return Poll::Ready(None);
            };
            self.replacing = Some((answer, buffer.len()));
        }
        while let Some((left, replaced)) = &mut self.replacing {
            if left.is_empty() {
                let written = *replaced;
                self.replacing = None;
                return Poll::Ready(Some(Ok(written)));
            }
            match ready!(Pin::new(&mut self.stream).poll_write(cx, left)) {
                Ok(written) => left.advance(written),
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
        Poll::Ready(None)
    }
}

/// The status of a bare error answer.
fn bare_error(buffer: &[u8]) -> Option<u16> {
    let rest = buffer.strip_prefix(b"HTTP/1.1 4").filter(|_| buffer.ends_with(b"\r\n\r\n"))?;
    let head = std::str::from_utf8(buffer).ok()?;
    let has = |name: &str| head.lines().any(|line| line.to_ascii_lowercase().starts_with(name));
    if !has("content-length: 0") || has("x-request-id:") {
        return None;
    }
    let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
    digits.parse::<u16>().ok().map(|rest| 400 + rest)
}

impl AsyncRead for OwnErrors {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for OwnErrors {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        match ready!(self.replaced(cx, buffer)) {
            Some(written) => Poll::Ready(written),
            None => Pin::new(&mut self.stream).poll_write(cx, buffer),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [only] = buffers
            && let Some(written) = ready!(self.replaced(cx, only))
        {
            return Poll::Ready(written);
        }
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bare_head_is_an_answer_of_the_layer() {
        let bare =
            b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(bare_error(bare), Some(431));
        assert_eq!(bare_error(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"), Some(400));
        for other in [
            &b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"[..],
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nx-request-id: 1\r\n\r\n",
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: 10\r\n\r\n{}",
            b"HTTP/1.1 4",
            b"data: HTTP/1.1 400\r\n\r\n",
        ] {
            assert_eq!(bare_error(other), None, "{}", String::from_utf8_lossy(other));
        }
    }
}
