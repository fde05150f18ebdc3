//! The secret of a cluster: how processes of one model know each other until they have certificates.
//!
//! Every internal call (Watch, Operate, Dispatch, Decode, Prefill, ReceiveKv) carries it as gRPC metadata,
//! `authorization: Bearer <secret>`, and a server that has one answers everything else with `UNAUTHENTICATED`
//! before a message is read. It keeps strangers of the same network out; who can read that network can read it.
//! Without a secret nothing is asked or shown.

use std::{fmt, hint::black_box, io, path::Path, path::PathBuf, sync::Arc};

use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

/// A client's side of a connection inside the cluster.
pub type InternalChannel = InterceptedService<Channel, Present>;

/// Shortest secret in bytes: 16 characters are more than anybody guesses at the rate of network calls.
pub const MIN_SECRET_BYTES: usize = 16;

/// Longest; it travels with every call.
pub const MAX_SECRET_BYTES: usize = 256;

/// Metadata key of the secret.
const KEY: &str = "authorization";
const SCHEME: &str = "Bearer ";

/// The secret; cheap to clone, never printed.
#[derive(Clone)]
pub struct ClusterSecret(Arc<str>);

impl fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterSecret(…)")
    }
}

/// Why there is no secret. No variant shows any of it.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be read.
    #[error("cluster secret {}: {source}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Too short or too long.
    #[error("cluster secret: {bytes} bytes, must be {MIN_SECRET_BYTES}..={MAX_SECRET_BYTES}")]
    Length {
        /// What it has, blanks at its ends left out.
        bytes: usize,
    },
    /// Something that metadata cannot carry.
    #[error("cluster secret: byte {at} is no visible ASCII character")]
    Character {
        /// Where.
        at: usize,
    },
    /// The system gives no random bytes.
    #[error("cluster secret: no random bytes: {0}")]
    Random(io::Error),
}

impl ClusterSecret {
    /// A secret of visible ASCII characters; blanks and line ends around it are left out.
    pub fn new(text: &str) -> Result<Self, SecretError> {
        let text = text.trim();
        if !(MIN_SECRET_BYTES..=MAX_SECRET_BYTES).contains(&text.len()) {
            return Err(SecretError::Length { bytes: text.len() });
        }
        match text.bytes().position(|byte| !byte.is_ascii_graphic()) {
            Some(at) => Err(SecretError::Character { at }),
            None => Ok(Self(text.into())),
        }
    }

    /// Reads one from a file.
    pub fn read(path: &Path) -> Result<Self, SecretError> {
        let failed = |source| SecretError::File { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        // Somebody may name a file that is none of a secret; blanks around one are few.
        let most = 4 * MAX_SECRET_BYTES as u64;
        // A pipe nobody writes to would hold its reader for ever.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "this is no regular file")));
        }
        let file = std::fs::File::open(path).map_err(failed)?;
        io::Read::read_to_end(&mut io::Read::take(file, most), &mut bytes).map_err(failed)?;
        match std::str::from_utf8(&bytes) {
            Ok(text) => Self::new(text),
            Err(error) => Err(SecretError::Character { at: error.valid_up_to() }),
        }
    }

    /// Draws one: 256 random bits.
    pub fn draw() -> Result<Self, SecretError> {
        let mut bytes = [0_u8; 32];
        let mut source = std::fs::File::open("/dev/urandom").map_err(SecretError::Random)?;
        io::Read::read_exact(&mut source, &mut bytes).map_err(SecretError::Random)?;
        Ok(Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into()))
    }

    /// The secret itself, for the file that hands it on.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether this is what was presented. The time it takes depends on the length of what was presented only.
    fn is(&self, presented: &[u8]) -> bool {
        let ours = self.0.as_bytes();
        let mut differences = usize::from(ours.len() != presented.len());
        for (at, byte) in presented.iter().enumerate() {
            differences |= usize::from(byte ^ ours[at % ours.len()]);
        }
        black_box(differences) == 0
    }
}

/// A client's interceptor: shows the secret with every call.
#[derive(Clone, Debug, Default)]
pub struct Present(Option<MetadataValue<Ascii>>);

impl Present {
    /// Shows this secret, or nothing.
    pub fn new(secret: Option<&ClusterSecret>) -> Self {
        let value = secret.and_then(|secret| format!("{SCHEME}{}", secret.0).parse().ok());
        Self(value.map(|mut value: MetadataValue<Ascii>| {
            // Neither printed nor kept in the header tables of HTTP/2.
            value.set_sensitive(true);
            value
        }))
    }
}

impl Interceptor for Present {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert(KEY, value.clone());
        }
        Ok(request)
    }
}

/// A server's interceptor: refuses calls that do not show the secret.
#[derive(Clone, Debug, Default)]
pub struct Admit(Option<ClusterSecret>);

impl Admit {
    /// Asks for this secret, or for nothing.
    pub fn new(secret: Option<ClusterSecret>) -> Self {
        Self(secret)
    }
}

impl Interceptor for Admit {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(secret) = &self.0 else { return Ok(request) };
        let presented = request.metadata().get(KEY).map(|value| value.as_encoded_bytes());
        match presented.map(|value| value.strip_prefix(SCHEME.as_bytes()).unwrap_or_default()) {
            Some(presented) if secret.is(presented) => Ok(request),
            Some(_) => Err(Status::unauthenticated("this is not the secret of this cluster")),
            None => Err(Status::unauthenticated(
                "this cluster has a secret and the call shows none (--cluster-secret-file)",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use tonic::Code;

    use super::*;

    fn secret(text: &str) -> ClusterSecret {
        ClusterSecret::new(text).unwrap()
    }

    fn call(server: Option<&str>, client: Option<&str>) -> Result<(), Code> {
        let shown = Present::new(client.map(secret).as_ref()).call(Request::new(())).unwrap();
        Admit::new(server.map(secret)).call(shown).map(|_| ()).map_err(|status| status.code())
    }

    #[test]
    fn only_the_secret_itself_is_admitted() {
        let ours = "0123456789abcdef0123";
        assert_eq!(call(Some(ours), Some(ours)), Ok(()));
        let short = &ours[..MIN_SECRET_BYTES];
        let long = ours.repeat(2);
        for wrong in [None, Some("0123456789abcdef0124"), Some(short), Some(long.as_str())] {
            assert_eq!(call(Some(ours), wrong), Err(Code::Unauthenticated), "{wrong:?}");
        }
        assert_eq!(call(Some(&long), Some(ours)), Err(Code::Unauthenticated), "twice the same");
        assert_eq!(call(None, None), Ok(()));
        assert_eq!(call(None, Some(ours)), Ok(()), "a server without one asks for none");
        let mut bare = Request::new(());
        bare.metadata_mut().insert(KEY, ours.parse().unwrap());
        assert!(Admit::new(Some(secret(ours))).call(bare).is_err(), "the scheme is part of it");
    }

    #[test]
    fn neither_a_secret_nor_an_error_about_one_shows_it() {
        let text = "topsecret-topsecret";
        let shown = Present::new(Some(&secret(text)));
        let request = shown.clone().call(Request::new(())).unwrap();
        let printed = format!(
            "{:?} {:?} {shown:?} {:?} {:?}",
            secret(text),
            Admit::new(Some(secret(text))),
            request.metadata(),
            ClusterSecret::new(&format!("{text} {text}")).unwrap_err()
        );
        assert!(!printed.contains("topsecret"), "{printed}");
    }

    #[test]
    fn what_cannot_be_a_secret_is_refused() {
        let length = |bytes| format!("cluster secret: {bytes} bytes, must be 16..=256");
        let refused = |text: &str| ClusterSecret::new(text).unwrap_err().to_string();
        assert_eq!(refused(" short \n"), length(5));
        assert_eq!(refused(&"x".repeat(257)), length(257));
        assert_eq!(refused("0123456789 abcdef"), "cluster secret: byte 10 is no visible ASCII character");
        assert!(refused("0123456789äbcdefgh").contains("byte 10"));
        let missing = ClusterSecret::read(Path::new("/no/such/secret")).unwrap_err().to_string();
        assert!(missing.contains("/no/such/secret"), "{missing}");
        let device = ClusterSecret::read(Path::new("/dev/zero")).unwrap_err().to_string();
        assert!(device.contains("no regular file"), "{device}");
    }

    #[test]
    fn drawn_secrets_differ_and_come_back_from_a_file() {
        let (one, other) = (ClusterSecret::draw().unwrap(), ClusterSecret::draw().unwrap());
        assert!(one.expose().len() == 64 && !one.is(other.expose().as_bytes()));
        let path = std::env::temp_dir().join(format!("cadre-secret-test-{}", std::process::id()));
        std::fs::write(&path, format!("{}\n", one.expose())).unwrap();
        let read = ClusterSecret::read(&path);
        std::fs::remove_file(&path).unwrap();
        assert!(read.unwrap().is(one.expose().as_bytes()));
    }
}
