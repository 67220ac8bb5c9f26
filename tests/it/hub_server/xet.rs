//! The server for large uploads: the one that the Xet client's own crate brings along.

use std::sync::Arc;

use gptq::hub::{ContentId, of_bytes};
use tokio::runtime::Runtime;
use xet_client::cas_client::simulation::{
    DeletionControlableClient, DirectAccessClient, LocalTestServer, LocalTestServerBuilder, MemoryClient,
};
use xet_runtime::core::XetContext;

pub(super) struct XetServer {
    // Before the runtime that it runs on.
    server: LocalTestServer,
    contents: Arc<MemoryClient>,
    runtime: Runtime,
}

impl XetServer {
    pub(super) fn start() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let contents = runtime.block_on(async { MemoryClient::new(XetContext::default().unwrap()) });
        let server = runtime.block_on(LocalTestServerBuilder::new().with_client(contents.clone()).start());
        Self { server, contents, runtime }
    }

    pub(super) fn endpoint(&self) -> String {
        self.server.http_endpoint().to_owned()
    }

    /// The uploaded content with this digest.
    pub(super) fn content(&self, sha256: &str) -> Option<Vec<u8>> {
        self.runtime.block_on(async {
            for (file, _) in self.contents.list_file_shard_entries().await.unwrap() {
                let bytes = self.contents.get_file_data(&file, None).await.unwrap();
                let wanted = ContentId::Sha256(sha256.to_owned());
                if of_bytes(&bytes, &wanted) == wanted {
                    return Some(bytes.to_vec());
                }
            }
            None
        })
    }
}
