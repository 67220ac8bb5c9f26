//! The files of a commit with their digests.
//!
//! `hf-hub` lists files too, but drops the digests of large ones.

use hf_hub::repository::RepoType;
use reqwest::{Url, header::LINK};
use serde::Deserialize;

use super::{
    answer::Problem,
    client::{About, Hub},
    digest::ContentId,
    transfer::Listed,
};
use crate::{
    error::{HubError, Result},
    folder::leads_down,
};

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    oid: String,
    lfs: Option<Large>,
}

/// A file of which git holds only a pointer: SHA-256 and size of its content.
#[derive(Deserialize)]
struct Large {
    oid: String,
    size: u64,
}

impl Hub {
    /// All files of a revision.
    pub(super) async fn list(&self, about: &About<'_>, revision: &str) -> Result<Vec<Listed>> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut next = Some(self.listing_address(about, revision)?);
        while let Some(address) = next {
            let (page, following) = self.ask(about, || self.page(&address)).await?;
            entries.extend(page);
            next = following;
        }
        let mut files = Vec::new();
        for entry in entries.into_iter().filter(|entry| entry.kind == "file") {
            let (size, id) = match entry.lfs {
                Some(large) => (large.size, ContentId::Sha256(large.oid)),
                None => (entry.size, ContentId::GitBlob(entry.oid)),
            };
            if !id.is_well_formed() {
                let action = format!("say the digest of `{}` of {}", entry.path, about.reference);
                let message = format!("it says `{}`", id.hex());
                return Err(HubError::Answer { action, message }.into());
            }
            if !leads_down(&entry.path) {
                let action = format!("list the files of {}", about.reference);
                let message = format!("it names `{}`, which is not below the repository", entry.path);
                return Err(HubError::Answer { action, message }.into());
            }
            files.push(Listed { path: entry.path, size, id });
        }
        Ok(files)
    }

    /// The address of a listing's first page.
    fn listing_address(&self, about: &About<'_>, revision: &str) -> Result<Url> {
        let endpoint = &self.settings.endpoint;
        let unusable =
            |problem: &str| HubError::Unreachable { endpoint: endpoint.clone(), problem: problem.into() };
        let (kind, repository) = (about.kind.plural(), about.reference.repository());
        let address = Url::parse(&format!("{endpoint}/api/{kind}/{repository}/tree"));
        let mut address = address.map_err(|error| unusable(&error.to_string()))?;
        // The revision may have a `/`, and is one segment all the same.
        address.path_segments_mut().map_err(|()| unusable("it is no address"))?.push(revision);
        address.set_query(Some("recursive=true"));
        Ok(address)
    }

    /// The entries of one page, and the address of the next one.
    async fn page(&self, address: &Url) -> Result<(Vec<Entry>, Option<Url>), Problem> {
        let response = self.signed(self.http.get(address.clone())).send().await;
        let response = response.map_err(|error| Problem { repeatable: true, ..Problem::from(&error) })?;
        if !response.status().is_success() {
            return Err(Problem::of_response(response).await);
        }
        let links = response.headers().get_all(LINK).iter().filter_map(|links| links.to_str().ok());
        let next = links.flat_map(|links| links.split(',')).find(|link| link.contains("rel=\"next\""));
        let next = next.and_then(|link| {
            let link = link.split_once('<')?.1.split_once('>')?.0;
            // The request carries the token, which must reach no other server.
            address.join(link).ok().filter(|next| next.origin() == address.origin())
        });
        let entries = response.json().await.map_err(|error| Problem::from(&error))?;
        Ok((entries, next))
    }
}
