//! Binding a port. `[::]` is every address of both families; where a machine has no IPv6 it is every address of
//! IPv4, so that one value in a manifest serves every cluster.

use std::{
    future::Future,
    io,
    net::{Ipv4Addr, SocketAddr},
};

use rustix::io::Errno;
use tokio::net::TcpListener;

/// Binds a listener. Only `[::]` falls back to `0.0.0.0`, and only where the machine cannot have IPv6: another address
/// that was asked for and cannot be had, or a port that is taken, is an error.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    bind_by(address, TcpListener::bind).await
}

async fn bind_by<L, F>(address: SocketAddr, bind: impl Fn(SocketAddr) -> F) -> io::Result<L>
where
    F: Future<Output = io::Result<L>>,
{
    let refused = match bind(address).await {
        Err(error) if everywhere_of_ipv6(address) && has_no_ipv6(&error) => error,
        other => return other,
    };
    let ipv4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
    tracing::info!(asked = %address, listens = %ipv4, why = %refused, "no IPv6 on this machine");
    bind(ipv4).await
}

fn everywhere_of_ipv6(address: SocketAddr) -> bool {
    address.is_ipv6() && address.ip().is_unspecified()
}

/// The family is not built in or switched off (`ipv6.disable=1`), or no interface has it.
fn has_no_ipv6(error: &io::Error) -> bool {
    [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL].iter().any(|no| error.raw_os_error() == Some(no.raw_os_error()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::sync::Mutex;

    use super::*;

    /// What was tried, in order, on a machine whose IPv6 answers with this error.
    async fn tried(address: &str, no_ipv6: Errno) -> (Vec<String>, Result<String, Option<i32>>) {
        let seen = Mutex::new(Vec::new());
        let bind = |address: SocketAddr| {
            seen.lock().unwrap().push(address.to_string());
            let result = match address {
                SocketAddr::V6(_) => Err(io::Error::from_raw_os_error(no_ipv6.raw_os_error())),
                SocketAddr::V4(_) => Ok(address.to_string()),
            };
            async move { result }
        };
        let bound = bind_by(address.parse().unwrap(), bind).await.map_err(|error| error.raw_os_error());
        (seen.into_inner().unwrap(), bound)
    }

    #[tokio::test]
    async fn everywhere_is_ipv4_where_there_is_no_ipv6() {
        for errno in [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL] {
            let (seen, bound) = tried("[::]:7", errno).await;
            assert_eq!((seen, bound), (vec!["[::]:7".into(), "0.0.0.0:7".into()], Ok("0.0.0.0:7".into())));
        }
    }

    #[tokio::test]
    async fn what_is_no_lack_of_ipv6_and_what_is_one_address_are_errors() {
        let (seen, bound) = tried("[::]:7", Errno::ADDRINUSE).await;
        assert_eq!((seen.len(), bound), (1, Err(Some(Errno::ADDRINUSE.raw_os_error()))));
        let (seen, bound) = tried("[::1]:7", Errno::ADDRNOTAVAIL).await;
        assert_eq!((seen.len(), bound), (1, Err(Some(Errno::ADDRNOTAVAIL.raw_os_error()))));
        assert_eq!(tried("10.0.0.1:7", Errno::AFNOSUPPORT).await.1, Ok("10.0.0.1:7".into()));
    }

    /// Whatever this machine has.
    #[tokio::test]
    async fn everywhere_is_reached_over_ipv4() {
        let listener = bind("[::]:0".parse().unwrap()).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    }
}
